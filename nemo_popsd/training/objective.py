"""The loss of a micro-batch and the statistics of its tokens.

Shapes: N response tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation import (
    DiagnosedTokens,
    Divergence,
    HiddenPair,
    StatisticValues,
    Target,
    loss_from_hidden,
)
from nemo_popsd.megatron.microbatches import MicroBatch
from nemo_popsd.megatron.student import Student
from nemo_popsd.training.branches import TargetStates


@dataclass(frozen=True)
class LossReport:
    """Detached results of one micro-batch."""

    rows: list[int]
    """Indices of its trajectories."""
    response_lengths: list[int]
    """Response tokens of each that this rank owns."""
    loss: Tensor
    """Σ weight · divergence, this micro-batch's part of the global loss; a scalar."""
    per_token: Tensor
    """[N] divergence."""
    statistics: StatisticValues
    """`TOKEN_STATISTICS` of its tokens [N]."""
    decomposition: StatisticValues | None
    """`SIGNAL_STATISTICS` of its diagnosed tokens [D]."""
    log_probs: Tensor
    """[N] log-probabilities of its response tokens under the student, at temperature 1."""


class Objective:
    """Divergence of the student from the target, weighted over the global batch."""

    def __init__(
        self,
        student: Student,
        target: Target,
        divergence: Divergence,
        *,
        loss_mean: str,
        chunk_tokens: int | None,
        fused: str,
    ) -> None:
        """Keeps references only; see `nemo_popsd.distillation.config` for the arguments."""
        self._student = student
        self.target = target
        self.divergence = divergence
        self._loss_mean = loss_mean
        self._chunk_tokens = chunk_tokens
        self._fused = fused

    def with_target(self, target: Target) -> Objective:
        """The same objective with another target."""
        return Objective(
            self._student,
            target,
            self.divergence,
            loss_mean=self._loss_mean,
            chunk_tokens=self._chunk_tokens,
            fused=self._fused,
        )

    def token_weights(self, response_lengths: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Weight of a response token of each of this rank's trajectories: [len(response_lengths)] float64.

        ``sequence``: 1 / (sequences · length), over the sequences of all ranks that have a response; ``token``:
        1 / tokens of all ranks. The global loss is the sum over ranks of Σ weight · divergence. One all-reduce of
        two numbers.

        Args:
            response_lengths: of this rank's trajectories.
            group: data-parallel group.
            device: where the group's collectives run.
        """
        lengths = torch.tensor(response_lengths, dtype=torch.float64, device=device)
        totals = torch.stack([(lengths > 0).sum().double(), lengths.sum()])
        dist.all_reduce(totals, group=group)
        sequences, tokens = totals.clamp(min=1).tolist()
        if self._loss_mean == "token":
            return torch.full_like(lengths, 1.0 / tokens)
        weights: Tensor = 1.0 / (sequences * lengths.clamp(min=1))
        return weights

    def __call__(
        self, batch: MicroBatch, hidden_NH: Tensor, states: Sequence[TargetStates], weights: Tensor
    ) -> tuple[Tensor, LossReport]:
        """The weighted loss of a micro-batch, with gradient, and its report.

        Args:
            batch: the micro-batch.
            hidden_NH: the student's states that predict its response tokens.
            states: target states of all of this rank's trajectories, on any device.
            weights: from `token_weights`.
        """
        student, batch_states = self._student, [states[row] for row in batch.sequences]
        lengths = torch.tensor(batch.response_lengths, device=hidden_NH.device)
        rows = torch.tensor(batch.sequences, device=hidden_NH.device)
        result = loss_from_hidden(
            hidden_NH,
            student.weight,
            _joined([state.vectors for state in batch_states], hidden_NH.device),
            student.base_weight,
            target=self.target,
            divergence=self.divergence,
            shard=student.vocab_shard,
            token_weights=weights.float()[rows].repeat_interleave(lengths),
            chunk_tokens=self._chunk_tokens,
            centre=student.centre,
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
            per_token=result.per_token,
            statistics=result.statistics,
            decomposition=result.decomposition,
            log_probs=result.log_probs,
        )
        return result.total, report


def _joined(vectors: Sequence[HiddenPair], device: torch.device) -> HiddenPair:
    """The vectors of several trajectories, one after the other, on `device`."""
    anchors = [pair.anchor for pair in vectors if pair.anchor is not None]
    shifts = [pair.shift for pair in vectors if pair.shift is not None]
    return HiddenPair(
        anchor=_concatenated(anchors, device) if anchors else None,
        shift=_concatenated(shifts, device) if shifts else None,
    )


def _concatenated(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.to(device, non_blocking=True) for part in parts])


def _diagnosed(batch: MicroBatch, states: Sequence[TargetStates], device: torch.device) -> DiagnosedTokens | None:
    """The diagnosed tokens of several trajectories, by their index in the micro-batch."""
    tokens = [state.diagnosed for state in states if state.diagnosed is not None]
    if len(tokens) < len(states):
        return None
    offsets = [sum(batch.response_lengths[:i]) for i in range(len(states))]
    return DiagnosedTokens(
        index=_concatenated([part.index + offset for part, offset in zip(tokens, offsets, strict=True)], device),
        privileged=_concatenated([part.privileged for part in tokens], device),
        reference=_concatenated([part.reference for part in tokens], device),
    )
