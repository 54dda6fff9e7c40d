"""Assigning rollouts to data-parallel ranks by equal work, and to the updates of a step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch.distributed as dist

from nemo_popsd.training.trajectory import Trajectory


def rebalance(trajectories: Sequence[Trajectory], group: dist.ProcessGroup, updates: int) -> list[list[Trajectory]]:
    """This rank's trajectories for each update of a step, assigned by their lengths.

    Update u takes the trajectories u, u + updates, ... of the step, counted over all ranks, in any layout. Within each
    update they are assigned so that every rank computes about the same number of tokens. The responses themselves do
    not depend on this.

    Every rank gathers all trajectories of the step as objects (one gather over `group`; token ids and texts, about 4
    bytes for each token of a row's contexts) and computes the same assignment.

    Args:
        trajectories: of this rank; those of all ranks together are the step.
        group: data-parallel group.
        updates: number of updates.

    Returns:
        One list for each update.
    """
    step = list(trajectories)
    if group.size() > 1:
        gathered: list[list[Trajectory]] = [[]] * group.size()
        dist.all_gather_object(gathered, step, group=group)
        step = [trajectory for part in gathered for trajectory in part]
    parts = [step[update::updates] for update in range(updates)]
    return [
        [part[index] for index in balanced_shares([t.cost for t in part], group.size())[group.rank()]] for part in parts
    ]


def balanced_shares(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank: the most expensive first, each to the rank with the least cost so far.

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
