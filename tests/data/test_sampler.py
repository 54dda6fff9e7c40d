from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_popsd.data.sampler import StepSampler, collate
from nemo_popsd.errors import UserError


def sampler(rows: int = 10, step_rows: int = 4, **changes: int | bool) -> StepSampler:
    given_settings: dict[str, int | bool] = {"seed": 1, **changes}
    return StepSampler(rows, prompts_per_step=step_rows, **given_settings)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    share=st.integers(1, 5),
    dp_size=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 50),
    shuffle=st.booleans(),
)
def test_ranks_together_make_the_global_batch(
    rows: int, share: int, dp_size: int, seed: int, start: int, shuffle: bool
) -> None:
    size = share * dp_size
    one = StepSampler(rows, prompts_per_step=size, seed=seed, shuffle=shuffle, start_step=start)
    ranks = [
        StepSampler(
            rows, prompts_per_step=size, seed=seed, shuffle=shuffle, start_step=start, dp_rank=rank, dp_size=dp_size
        )
        for rank in range(dp_size)
    ]
    for whole, *parts in islice(zip(one, *ranks, strict=True), 5):
        assert len(whole) == size
        assert [row for part in parts for row in part] == whole
        assert {len(part) for part in parts} == {share}


@pytest.mark.parametrize(("rows", "step_rows"), [(10, 4), (3, 8), (8, 4), (1, 2), (7, 7)])
def test_every_epoch_visits_every_row_once(rows: int, step_rows: int) -> None:
    line = [row for batch in islice(sampler(rows, step_rows), 30) for row in batch]
    for epoch in range(len(line) // rows):
        assert Counter(line[epoch * rows : (epoch + 1) * rows]) == Counter(range(rows))


@pytest.mark.parametrize("start", [1, 2, 3, 17])
def test_resuming_continues_the_same_order(start: int) -> None:
    whole = list(islice(sampler(), 25))
    assert list(islice(sampler(start_step=start), 25 - start)) == whole[start:]


def test_each_iterator_starts_at_start_step() -> None:
    made = sampler()
    assert next(iter(made)) == next(iter(made)) == made.global_batch(0)


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {tuple(sampler(50, 50, seed=seed).global_batch(epoch)) for seed in (1, 2, 11) for epoch in (0, 1)}
    assert len(orders) == 6
    assert sampler(50, 50).global_batch(1) == [
        row for step in (5, 6, 7, 8, 9) for row in sampler(50, 10).global_batch(step)
    ]


def test_the_order_equals_the_recorded_one() -> None:
    assert sampler(10, 10, seed=1234).global_batch(0) == [0, 8, 5, 2, 1, 9, 4, 3, 6, 7]


def test_file_order_without_shuffle() -> None:
    assert list(islice(sampler(5, 2, shuffle=False), 4)) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_epoch() -> None:
    assert [sampler(10, 4).epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(("step_rows", "dp_size"), [(4, 3), (2, 4), (0, 1)])
def test_batch_must_divide(step_rows: int, dp_size: int) -> None:
    with pytest.raises(
        UserError, match=f"prompts_per_step={step_rows} on {dp_size} .*a positive multiple of {dp_size}"
    ):
        sampler(10, step_rows, dp_size=dp_size)


def test_no_rows() -> None:
    with pytest.raises(UserError, match="no rows"):
        sampler(0)


@pytest.mark.parametrize("changes", [{"dp_rank": 2, "dp_size": 2}, {"dp_rank": -1}, {"start_step": -1}])
def test_impossible_rank_or_step(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="dp_rank"):
        sampler(**changes)


def test_collate_keeps_the_rows() -> None:
    assert collate(("a", "b")) == ["a", "b"]
