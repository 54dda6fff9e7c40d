"""The loss of a micro-batch and what is measured beside it.

Shapes: N response tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation import (
    DecompositionStatistics,
    DiagnosedTokens,
    Divergence,
    FrozenStates,
    Target,
    TokenStatistics,
    loss_from_hidden,
)
from nemo_popsd.megatron.microbatches import MicroBatch
from nemo_popsd.megatron.student import Student
from nemo_popsd.training.branches import TargetStates


@dataclass(frozen=True)
class LossReport:
    """Detached results of one micro-batch."""

    rows: list[int]
    """Which trajectories."""
    response_lengths: list[int]
    """Their response tokens that this rank owns."""
    loss: Tensor
    """Σ weight · divergence, this micro-batch's part of the global loss; a scalar."""
    per_token: Tensor
    """[N] divergence."""
    statistics: TokenStatistics
    """[N] each."""
    decomposition: DecompositionStatistics | None
    """[D] each, on the diagnosed tokens."""


class Objective:
    """Divergence of the student from the target, weighted by the global batch."""

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
        """Weight of each response token of each of this rank's trajectories, by trajectory: [len(response_lengths)].

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
        return 1.0 / (sequences * lengths.clamp(min=1))

    def __call__(
        self, batch: MicroBatch, hidden_NH: Tensor, states: Sequence[TargetStates], weights: Tensor
    ) -> tuple[Tensor, LossReport]:
        """The weighted loss of a micro-batch, with gradient, and its report.

        Args:
            batch: the micro-batch.
            hidden_NH: the student's states at its response positions.
            states: target states of all of this rank's trajectories, on any device.
            weights: from `token_weights`.
        """
        student, mine = self._student, [states[row] for row in batch.sequences]
        lengths = torch.tensor(batch.response_lengths, device=hidden_NH.device)
        rows = torch.tensor(batch.sequences, device=hidden_NH.device)
        result = loss_from_hidden(
            hidden_NH,
            student.weight,
            _joined([state.frozen for state in mine], hidden_NH.device),
            student.base_weight,
            target=self.target,
            divergence=self.divergence,
            vocab_size=student.vocab_size,
            tp_group=student.tp_group,
            token_weights=weights.float()[rows].repeat_interleave(lengths),
            chunk_tokens=self._chunk_tokens,
            centre=student.centre,
            soft_cap=student.soft_cap,
            fused=self._fused,
            main_gradient=student.main_gradient,
            diagnosed=_diagnosed(batch, mine, hidden_NH.device),
        )
        report = LossReport(
            rows=batch.sequences,
            response_lengths=batch.response_lengths,
            loss=result.total.detach(),
            per_token=result.per_token,
            statistics=result.statistics,
            decomposition=result.decomposition,
        )
        return result.total, report


def _joined(states: Sequence[FrozenStates], device: torch.device) -> FrozenStates:
    """The states of several trajectories, one after the other, on `device`."""
    parts = zip(*states, strict=True)
    return type(states[0])(*(None if part[0] is None else _together(part, device) for part in parts))


def _together(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.to(device, non_blocking=True) for part in parts])


def _diagnosed(batch: MicroBatch, mine: Sequence[TargetStates], device: torch.device) -> DiagnosedTokens | None:
    """The diagnosed tokens of several trajectories, by their place in the micro-batch."""
    tokens = [state.diagnosed for state in mine if state.diagnosed is not None]
    if len(tokens) < len(mine):
        return None
    offsets = [sum(batch.response_lengths[:row]) for row in range(len(mine))]
    return DiagnosedTokens(
        index=_together([part.index + offset for part, offset in zip(tokens, offsets, strict=True)], device),
        privileged=_together([part.privileged for part in tokens], device),
        reference=_together([part.reference for part in tokens], device),
    )
