"""Forward passes of a diagnosis: rollouts in batches, equal in number on all ranks, and their hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.diagnosis.config import DiagnosisSettings
from nemo_popsd.errors import StopRequested
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.distributed import device
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, row_seed
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class RowRollout:
    """The rollout of one row."""

    row: int
    """Index of the row."""
    trajectory: Trajectory


def generate_rollouts(
    student: Student,
    engine: RolloutEngine,
    sampling: SamplingParams,
    rows: Sequence[PromptRow],
    settings: DiagnosisSettings,
    stop: StopSignals | None,
) -> list[RowRollout]:
    """Generates one rollout for each of this data-parallel rank's rows.

    Ranks that share experts generate equal numbers of rollouts: a rank with fewer rows also generates one for the first
    row and discards it.

    Args:
        student: determines the groups over which rows are distributed.
        engine: generates the rollouts.
        sampling: sampling parameters.
        rows: rows of all ranks.
        settings: the seed of the run, and whether ranks share experts.
        stop: checked after the rollouts, which a signal ends early.

    Raises:
        StopRequested: a signal requested a stop. Raised on every rank.
    """
    dp_rank, dp_size = student.dp_group.rank(), student.dp_group.size()
    own_indices = list(range(len(rows)))[dp_rank::dp_size]
    indices = list(own_indices)
    if settings.expert_parallel:
        indices += [0] * (math.ceil(len(rows) / dp_size) - len(own_indices))
    requests = [
        Request(row.contexts.student, row_seed(settings.seed, "diagnosis", row.record.id))
        for row in (rows[index] for index in indices)
    ]
    rollouts: list[Rollout] = []
    try:
        rollouts = engine.generate(requests, sampling) if requests else []
    except StopRequested:
        if stop is None:
            raise
        stop.request()
    if stop is not None:
        stop.raise_if_requested()
    own_rollouts = rollouts[: len(own_indices)]
    return [
        RowRollout(index, Trajectory(rows[index], rollout))
        for index, rollout in zip(own_indices, own_rollouts, strict=True)
    ]


def token_batches(rollouts: Sequence[RowRollout], token_budget: int) -> Iterator[list[RowRollout]]:
    """`rollouts` in order, in batches of at most `token_budget` response tokens; a longer one forms its own batch."""
    batch: list[RowRollout] = []
    tokens = 0
    for rollout in rollouts:
        length = len(rollout.trajectory.rollout.response)
        if batch and tokens + length > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(rollout)
        tokens += length
    if batch:
        yield batch


def equal_counts(student: Student, batches: Iterable[list[RowRollout]]) -> list[list[RowRollout]]:
    """`batches`, padded with empty batches to the same number on every data-parallel rank.

    If ranks share experts, the forwards of the batches are collective. One all-reduce of one number.
    """
    own = list(batches)
    most = torch.tensor(len(own), device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=student.dp_group)
    return own + [[] for _ in range(int(most) - len(own))]


def hidden_states(
    chunks: list[ModelChunk], sequences: list[ContextSequence], settings: DiagnosisSettings
) -> list[Tensor]:
    """Hidden states at the response tokens that this rank owns of each sequence; see `frozen_hidden_states`."""
    return frozen_hidden_states(
        chunks, student_batches(chunks, sequences, settings.frozen_tokens, packed=settings.packing)
    )
