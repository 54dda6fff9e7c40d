"""Forward passes of a diagnosis: rollouts in batches, the same number on every rank, and their hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.diagnosis.config import DiagnosisSettings
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class RowRollout:
    """The rollout of one row."""

    row: int
    """Index of the row."""
    trajectory: Trajectory


def token_batches(rollouts: Sequence[RowRollout], token_budget: int) -> Iterator[list[RowRollout]]:
    """`rollouts` in order, in batches of at most `token_budget` response tokens; a longer one is a batch of its own."""
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
    """`batches`, with empty ones added until every data-parallel rank has equally many (one all-reduce of one number).

    Their forwards are collective where ranks share experts.
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
