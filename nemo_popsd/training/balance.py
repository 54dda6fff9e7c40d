"""Who trains on which rollout: equal work for data-parallel ranks, and the parts of a step that updates are made on."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch.distributed as dist

from nemo_popsd.training.trajectory import Trajectory


def rebalance(trajectories: Sequence[Trajectory], group: dist.ProcessGroup, updates: int) -> list[list[Trajectory]]:
    """This rank's trajectories for each of a step's updates, shared out anew by their lengths.

    Update u takes the trajectories u, u + updates, ... of the step, counted over all ranks, in any layout. Rollouts
    have ended where they ended: within each update they are shared out so that every rank computes about as many
    tokens. Nothing that a rollout was drawn with depends on this.

    Every rank gathers the whole step as objects (one gather over `group`; token ids and texts, some 4 bytes for each
    token of a row's contexts) and computes the same shares.

    Args:
        trajectories: of this rank; on all ranks together they are the step.
        group: data-parallel group.
        updates: parts.
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
    """Indices of `costs` shared out over `ranks`: the dearest first, each to the rank with the least so far.

    No rank has more than 4/3 of the best possible greatest sum (Graham's bound for this rule). Deterministic; each
    share in ascending order. Where there are fewer costs than ranks, some shares are empty.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]
