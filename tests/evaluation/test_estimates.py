"""Estimates compared with enumeration, and intervals with their nominal coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemo_popsd.evaluation.estimates import Ratio, changes, interval, intervals, majority_is_correct, pass_at_k

SETTINGS = {"resamples": 2000, "confidence": 0.95, "seed": 0}


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        drawn = [True] * correct + [False] * (samples - correct)
        choices = [any(choice) for choice in itertools.combinations(drawn, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(choices) / len(choices))


@pytest.mark.parametrize(
    ("votes", "correct", "value"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1], [True, False], 0.5),
        ([0, 1, 2], [True, False, False], 1 / 3),
        ([None, None, 0], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([0, None, 0, 1, 1, 2], [False, False, False, True, True, False], 0.5),
    ],
)
def test_majority(votes: list[int | None], correct: list[bool], value: float) -> None:
    assert majority_is_correct(votes, correct) == pytest.approx(value)


def test_ratio() -> None:
    assert Ratio([1, 3], [2, 2]).value == 1.0
    assert Ratio([0.0], [0.0]).value == 0.0


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=400)
    (low, high) = intervals({"mean": Ratio(list(values), [1.0] * 400)}, **SETTINGS)["mean"]
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_intervals_have_their_nominal_coverage() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        chances = generator.beta(2, 2, size=60)  # problems of varying difficulty, mean 0.5, four samples each
        values = generator.binomial(4, chances) / 4
        found = intervals({"x": Ratio(list(values), [1.0] * 60)}, resamples=400, confidence=0.9, seed=trial)
        covered += found["x"][0] <= 0.5 <= found["x"][1]
    assert 0.85 < covered / 300 < 0.95


def test_a_rate_is_resampled_with_its_tokens() -> None:
    # All markers are in one long response of ten, which dominates both sums of a resample that contains it.
    figure = Ratio([1000.0 * 90, *[0.0] * 9], [9000.0, *[100.0] * 9])
    low, high = intervals({"rate": figure}, **SETTINGS)["rate"]
    assert low == 0.0
    assert figure.value < high <= 10.0


def test_pairing_cancels_the_difficulty_of_the_problems() -> None:
    difficulty = np.random.default_rng(2).uniform(0, 1, size=100)
    before = {"x": Ratio(list(difficulty), [1.0] * 100)}
    after = {"x": Ratio(list(difficulty + 0.02), [1.0] * 100), "only here": Ratio([0.0] * 100, [1.0] * 100)}
    found = changes(before, after, **SETTINGS)
    assert list(found) == ["x"]
    assert found["x"] == pytest.approx((0.02, 0.02))
    alone = intervals(after, **SETTINGS)["x"]
    assert alone[1] - alone[0] > 0.1


def test_one_problem_and_equal_values_have_no_width() -> None:
    assert intervals({"x": Ratio([0.5], [1.0])}, **SETTINGS)["x"] == (0.5, 0.5)
    assert interval(np.full(100, 0.25), 0.95) == (0.25, 0.25)
    assert intervals({"nothing": Ratio([0.0, 0.0], [0.0, 0.0])}, **SETTINGS)["nothing"] == (0.0, 0.0)
