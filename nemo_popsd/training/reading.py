"""Properties of the text of a response that a step uses: markers, and whether its final answer is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from nemo_popsd.data.records import Record
from nemo_popsd.megatron.student import Student
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class ResponseReader:
    """Functions of a response's token ids."""

    count_markers: Callable[[Sequence[int]], int]
    """Number of epistemic markers in the text."""
    marked: Callable[[Sequence[int]], Sequence[bool]]
    """Whether each token belongs to a marker."""
    is_right: Callable[[Record, Sequence[int]], bool] | None
    """Whether the final answer matches that of the row, which must have one; None if rows have no answers."""


def verified(trajectories: Sequence[Trajectory], reader: ResponseReader, student: Student) -> list[Trajectory]:
    """`trajectories` with the field `right`; unchanged if rows have no answers.

    The replica leader compares the answers, so that a comparison with a time limit has the same result on all ranks of
    the replica. One gather of objects over the world, one byte per response; none if rows have no answers.

    Args:
        trajectories: trajectories of this replica, the same on all its ranks.
        reader: reader of the run.
        student: determines the position of this rank among the others.
    """
    is_right = reader.is_right
    if is_right is None:
        return list(trajectories)
    replica, verdicts = student.dp_group.rank(), b""
    if student.is_replica_leader:
        verdicts = bytes(is_right(t.row.record, t.rollout.response) for t in trajectories)
    gathered: list[tuple[int, bytes]] = [(0, b"")] * dist.get_world_size()
    dist.all_gather_object(gathered, (replica if student.is_replica_leader else -1, verdicts))
    own = dict(gathered)[replica]
    return [replace(t, right=bool(verdict)) for t, verdict in zip(trajectories, own, strict=True)]
