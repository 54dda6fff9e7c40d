"""The loss of a micro-batch and the statistics of its tokens.

Shapes: N response tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_popsd.distillation import (
    DiagnosedTokens,
    Divergence,
    Gates,
    HiddenPair,
    StatisticValues,
    Target,
    loss_from_hidden,
)
from nemo_popsd.megatron.microbatches import MicroBatch
from nemo_popsd.megatron.moving import OutputMatrix
from nemo_popsd.megatron.student import Student
from nemo_popsd.training.branches import TargetStates


@dataclass(frozen=True)
class LossReport:
    """Detached results of one micro-batch."""

    rows: list[int]
    """Indices of the trajectories."""
    response_lengths: list[int]
    """For each trajectory, number of response tokens that this rank owns."""
    loss: Tensor
    """Σ share · divergence over open tokens, this micro-batch's part of the global loss; a scalar."""
    counted: Tensor
    """Number of tokens that are open and have a share above 0; a scalar."""
    per_token: Tensor
    """Divergence of each token [N]."""
    statistics: StatisticValues
    """`TOKEN_STATISTICS` of the tokens [N]."""
    decomposition: StatisticValues | None
    """`SIGNAL_STATISTICS` of the diagnosed tokens [D]."""
    log_probs: Tensor
    """Log-probabilities of the response tokens under the student at temperature 1 [N]."""


class Objective:
    """Divergence of the student from the target, weighted over the global batch."""

    def __init__(
        self,
        student: Student,
        target: Target,
        divergence: Divergence,
        *,
        chunk_tokens: int | None,
        fused: str,
        gates: Gates | None = None,
        output: Callable[[], OutputMatrix] | None = None,
    ) -> None:
        """Stores references only; see `nemo_popsd.distillation.config` for the arguments.

        `output` returns the output matrix of the frozen branches, by default that of the student's base.
        """
        self._student = student
        self.target = target
        self.divergence = divergence
        self._chunk_tokens = chunk_tokens
        self._fused = fused
        self._gates = gates or Gates()
        self._output = output or (lambda: OutputMatrix(lambda: student.base_weight, lambda: student.centre))

    def with_target(self, target: Target) -> Objective:
        """An objective with the same divergence, another target of the student's base, and no gates."""
        return Objective(self._student, target, self.divergence, chunk_tokens=self._chunk_tokens, fused=self._fused)

    def __call__(
        self, batch: MicroBatch, hidden_NH: Tensor, states: Sequence[TargetStates], shares: Sequence[Tensor]
    ) -> tuple[Tensor, LossReport]:
        """The weighted loss of a micro-batch, with gradient, and its report.

        Args:
            batch: the micro-batch.
            hidden_NH: hidden states of the student that predict the response tokens.
            states: target states of all trajectories of this rank, on any device.
            shares: for each trajectory of this rank, shares of the response tokens that it owns, fp32, on the device of
                `hidden_NH`; see `training.weights`.
        """
        student, batch_states = self._student, [states[row] for row in batch.sequences]
        output = self._output()
        share_N = torch.cat([hidden_NH.new_zeros(0, dtype=torch.float32), *(shares[row] for row in batch.sequences)])
        result = loss_from_hidden(
            hidden_NH,
            student.weight,
            _joined([state.vectors for state in batch_states], hidden_NH.device),
            output.weight(),
            target=self.target,
            divergence=self.divergence,
            shard=student.vocab_shard,
            gates=self._gates,
            token_weights=share_N,
            chunk_tokens=self._chunk_tokens,
            centre=output.centre(),
            fused=self._fused,
            main_gradient=student.main_gradient,
            diagnosed=_diagnosed(batch, batch_states, hidden_NH.device),
            response_ids=batch.response_ids,
        )
        assert result.log_probs is not None
        report = LossReport(
            rows=batch.sequences,
            response_lengths=batch.response_lengths,
            loss=result.total.detach(),
            counted=_counted(share_N, result.is_open),
            per_token=result.per_token,
            statistics=result.statistics,
            decomposition=result.decomposition,
            log_probs=result.log_probs,
        )
        return result.total, report


def _counted(share_N: Tensor, open_N: Tensor | None) -> Tensor:
    return (share_N if open_N is None else share_N * open_N).count_nonzero()


def _joined(vectors: Sequence[HiddenPair], device: torch.device) -> HiddenPair:
    """The concatenated vectors of several trajectories, on `device`."""
    anchors = [pair.anchor for pair in vectors if pair.anchor is not None]
    shifts = [pair.shift for pair in vectors if pair.shift is not None]
    return HiddenPair(
        anchor=_concatenated(anchors, device) if anchors else None,
        shift=_concatenated(shifts, device) if shifts else None,
    )


def _concatenated(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.to(device, non_blocking=True) for part in parts])


def _diagnosed(batch: MicroBatch, states: Sequence[TargetStates], device: torch.device) -> DiagnosedTokens | None:
    """The diagnosed tokens of several trajectories, with their indices in the micro-batch."""
    tokens = [state.diagnosed for state in states if state.diagnosed is not None]
    if len(tokens) < len(states):
        return None
    offsets = [sum(batch.response_lengths[:i]) for i in range(len(states))]
    return DiagnosedTokens(
        index=_concatenated([part.index + offset for part, offset in zip(tokens, offsets, strict=True)], device),
        privileged=_concatenated([part.privileged for part in tokens], device),
        reference=_concatenated([part.reference for part in tokens], device),
    )
