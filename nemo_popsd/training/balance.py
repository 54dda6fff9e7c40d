"""Assigns rollouts to the updates of a step and, balanced by cost, to data-parallel ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain

import torch.distributed as dist

from nemo_popsd.training.trajectory import Trajectory


def rebalance(
    trajectories: Sequence[Trajectory],
    group: dist.ProcessGroup,
    updates: int,
    *,
    by_row: bool = False,
    shared: bool = False,
) -> list[list[Trajectory]]:
    """This rank's trajectories for each update of a step, assigned by their lengths.

    Update u uses the trajectories u, u + updates, ... of the step, counted over all ranks, in any layout. With
    `by_row` it uses the rows u, u + updates, ... with all their trajectories, which are then on one rank. Within an
    update, trajectories are assigned so that every rank computes about the same number of tokens. The responses do not
    depend on the assignment.

    Every rank gathers all trajectories of the step as objects (one gather over `group`; token ids and texts, about 4
    bytes for each token of a row's contexts) and computes the same assignment.

    Args:
        trajectories: trajectories of this rank; those of all ranks form the step.
        group: data-parallel group.
        updates: number of updates.
        by_row: whether rows have several trajectories.
        shared: whether the frozen branches compute the prompts of a row only once.

    Returns:
        One list for each update.
    """
    step = list(trajectories)
    if group.size() > 1:
        gathered: list[list[Trajectory]] = [[]] * group.size()
        dist.all_gather_object(gathered, step, group=group)
        step = [trajectory for part in gathered for trajectory in part]
    units: dict[object, list[Trajectory]] = {}
    for place, trajectory in enumerate(step):
        units.setdefault(trajectory.row_id if by_row else place, []).append(trajectory)
    parts = [list(units.values())[update::updates] for update in range(updates)]
    shares = [
        balanced_shares([_cost(unit, shared=shared) for unit in part], group.size())[group.rank()] for part in parts
    ]
    return [list(chain(*(part[index] for index in share))) for part, share in zip(parts, shares, strict=True)]


def _cost(unit: Sequence[Trajectory], *, shared: bool) -> int:
    """Cost for one rank of trajectories of the same row."""
    contexts = unit[0].row.contexts
    prompts = len(contexts.student) + len(contexts.privileged) + len(contexts.reference)
    return sum(trajectory.cost for trajectory in unit) - shared * (len(unit) - 1) * prompts


def balanced_shares(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank, assigned by decreasing cost, each to the rank with the smallest sum so far.

    No rank has more than 4/3 of the smallest possible maximum (Graham's bound for this rule). Deterministic; each share
    is in ascending order. With fewer costs than ranks, some shares are empty.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]
