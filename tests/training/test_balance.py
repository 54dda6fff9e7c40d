from __future__ import annotations

import math
from itertools import chain
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nemo_popsd.training.balance import balanced_shares
from tests.harness import run_ranks

COSTS = st.lists(st.integers(0, 1000), max_size=24)


@given(COSTS, st.integers(1, 6))
def test_each_index_has_one_rank_and_loads_are_balanced(costs: list[int], ranks: int) -> None:
    shares = balanced_shares(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    least = max([0, *costs, math.ceil(sum(costs) / ranks)])  # no assignment has a smaller maximum
    assert max(sum(costs[i] for i in share) for share in shares) <= least + max([0, *costs]) * (1 - 1 / ranks)


def test_shares_of_examples() -> None:
    assert balanced_shares([5, 10, 4, 4], 2) == [[1], [0, 2, 3]]  # 10; then 5, 4, 4 to the smaller sum
    assert balanced_shares([5, 8, 4, 4], 2) == [[1, 3], [0, 2]]
    assert balanced_shares([7], 3) == [[0], [], []]
    assert balanced_shares([], 2) == [[], []]


def _siblings(rank: int, world_size: int) -> dict[str, Any]:
    """This rank's share of three rows with two rollouts each, which start on different ranks."""
    from dataclasses import replace

    import torch.distributed as dist

    from nemo_popsd.training.balance import rebalance
    from tests.training.runs import row, trajectory

    both = [replace(trajectory(number, 3 + number), row=row(number // 2)) for number in range(6)]
    mine = both[rank * 6 // world_size : (rank + 1) * 6 // world_size]
    return {
        f"{updates} updates": [
            [(t.row_id, len(t.rollout.response)) for t in part]
            for part in rebalance(mine, dist.group.WORLD, updates, by_row=True, shared=True)
        ]
        for updates in (1, 3)
    }


def test_siblings_stay_together() -> None:
    [one], two = run_ranks(_siblings, 1), run_ranks(_siblings, 2)
    rows = [[(f"row{number}", 3 + 2 * number), (f"row{number}", 4 + 2 * number)] for number in range(3)]
    assert one == {"1 updates": [[*chain(*rows)]], "3 updates": rows}
    for updates, parts in one.items():
        for part, whole in enumerate(parts):
            shares = [seen[updates][part] for seen in two]
            assert sorted(chain(*shares)) == sorted(whole)
            for name, _ in whole:
                assert sum(any(name == other for other, _ in share) for share in shares) == 1


def _rebalanced(rank: int, world_size: int) -> dict[str, Any]:
    """This rank's share of six rollouts; each of three ranks starts with a contiguous third."""
    import torch.distributed as dist

    from nemo_popsd.training.balance import rebalance
    from tests.training.runs import trajectory

    numbers = list(range(6))[rank * 6 // world_size : (rank + 1) * 6 // world_size]
    trajectories = [trajectory(number, [40, 1, 1, 1, 40, 40][number]) for number in numbers]
    return {
        f"{updates} updates": [[t.row_id for t in part] for part in rebalance(trajectories, dist.group.WORLD, updates)]
        for updates in (1, 2, 3)
    } | {"costs": {t.row_id: (t.cost, t.rollout.response) for t in trajectories}}


def test_updates_use_the_same_rows_in_any_layout() -> None:
    [one], three = run_ranks(_rebalanced, 1), run_ranks(_rebalanced, 3)
    assert one["1 updates"] == [[f"row{number}" for number in range(6)]]
    assert one["2 updates"] == [["row0", "row2", "row4"], ["row1", "row3", "row5"]]
    for updates in (1, 2, 3):
        for part, rows in enumerate(one[f"{updates} updates"]):
            assert sorted(row for seen in three for row in seen[f"{updates} updates"][part]) == sorted(rows)
    # The three long rollouts are on three ranks.
    for seen in three:
        assert len({"row0", "row4", "row5"} & set(seen["1 updates"][0])) == 1
        assert all(one["costs"][row] == cost for row, cost in seen["costs"].items())
