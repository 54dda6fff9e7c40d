"""Scores against their definitions, on synthetic answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_popsd.diagnosis.views.scores import (
    SUMS,
    AnswerFigures,
    Resampling,
    gain,
    gain_over,
    problems_needed,
    problems_with_both,
    score_student,
    score_target,
)

HOW = Resampling(resamples=500, confidence=0.95, seed=0)


def answer(problem: int, tokens: list[int], probability: object = None, **sums: float) -> AnswerFigures:
    """An answer with the given sums (0 for the others) and the given token probabilities [4, tokens]."""
    values = {"tokens": float(len(tokens)), **sums}
    probabilities = np.full((4, len(tokens)), 0.5) if probability is None else np.array(probability)
    return AnswerFigures(problem, tokens, np.array([values.get(name, 0.0) for name in SUMS]), probabilities)


def scored(figures: list[AnswerFigures], right: list[bool], teacher_right: dict[int, list[bool]]) -> dict:
    return score_target(figures, right, teacher_right, 1 + max(figure.problem for figure in figures), HOW)


def test_a_fork_compares_the_first_differing_tokens_of_a_right_and_a_wrong_answer() -> None:
    # Columns: tokens. The answers differ first at the second token; the others must not count.
    good = answer(0, [5, 7, 9], [[0.1, 0.3, 0.9], [0.1, 0.8, 0.9], [0.1, 0.5, 0.9], [0.1, 0.6, 0.9]])
    bad = answer(0, [5, 8], [[0.1, 0.1], [0.1, 0.2], [0.1, 0.5], [0.1, 0.2]])
    found = scored([good, bad], [True, False], {0: [True]})
    values = {name: found[f"fork_{name}"]["value"] for name in ("student", "teacher", "reference_only", "target")}
    assert values == pytest.approx({"student": 0.75, "teacher": 0.8, "reference_only": 0.5, "target": 0.75})
    assert found["fork_teacher_over_reference"]["value"] == pytest.approx(0.3)
    assert found["fork_target_over_student"]["value"] == pytest.approx(0.0)


def test_every_problem_with_right_and_wrong_answers_counts_once() -> None:
    def pair(problem: int, teacher: float, copies: int) -> list[AnswerFigures]:
        rows = [[0.5], [teacher], [0.5], [0.5]]
        others = [[0.5], [1 - teacher], [0.5], [0.5]]
        return [answer(problem, [1], rows)] * copies + [answer(problem, [2], others)]

    figures = [*pair(0, 0.9, 5), *pair(1, 0.5, 1), answer(2, [1])]
    right = [True] * 5 + [False] + [True, False] + [True]
    found = scored(figures, right, {0: [True], 1: [True], 2: [True]})
    assert found["fork_teacher"]["value"] == pytest.approx((0.9 + 0.5) / 2)


def test_an_answer_that_begins_with_another_has_no_fork_and_0_of_both_is_no_preference() -> None:
    assert scored([answer(0, [1, 2]), answer(0, [1])], [True, False], {0: [True]})["fork_target"] is None
    zero = [[0.2], [0.0], [0.2], [0.2]]
    found = scored([answer(0, [1], zero), answer(0, [2], zero)], [True, False], {0: [True]})
    assert found["fork_teacher"]["value"] == 0.5


def test_uncertain_tokens_of_right_answers_are_compared_with_those_of_wrong_ones() -> None:
    figures = [
        answer(0, [1, 1], uncertain=2.0, favour_teacher=0.8, favour_reference_only=0.2, favour_target=0.4),
        answer(0, [1, 1], uncertain=1.0, favour_teacher=0.1, favour_reference_only=0.1, favour_target=0.2),
        answer(0, [1, 1], uncertain=2.0, favour_teacher=-0.2, favour_student=0.4),
        answer(1, [1, 1], uncertain=1.0, favour_teacher=9.0),  # no wrong answer to compare with
    ]
    found = scored(figures, [True, True, False, True], {0: [True], 1: [True]})
    assert found["uncertain_teacher"]["value"] == pytest.approx(0.9 / 3 - -0.2 / 2)
    assert found["uncertain_teacher_over_reference"]["value"] == pytest.approx(0.4 - 0.1)
    assert found["uncertain_target_over_student"]["value"] == pytest.approx(0.2 + 0.2)
    nothing = scored([answer(0, [1]), answer(0, [2])], [True, False], {0: [True]})
    assert nothing["uncertain_teacher"] is None


def test_the_gain_is_the_pooled_covariance_of_rightness_and_lift_by_the_deviation_of_the_lift() -> None:
    generator = np.random.default_rng(0)
    lifts, rights = generator.normal(size=(5, 6)), generator.random((5, 6)) < 0.5
    figures = [answer(p, [1], lift=float(lift)) for p, row in enumerate(lifts) for lift in row]
    covariance = np.mean([((r - r.mean()) * (u - u.mean())).sum() / 5 for r, u in zip(rights, lifts, strict=True)])
    variance = np.mean([((u - u.mean()) ** 2).sum() / 5 for u in lifts])
    found = scored(figures, rights.flatten().tolist(), {p: [True] for p in range(5)})["gain"]
    assert found["value"] == pytest.approx(100 * covariance / math.sqrt(variance))
    assert found["low"] < found["value"] < found["high"]


def test_the_gain_of_a_lift_does_not_depend_on_its_scale_and_is_paired() -> None:
    generator = np.random.default_rng(1)
    lifts, rights = generator.normal(size=(8, 4)), (generator.random((8, 4)) < 0.5).flatten().tolist()
    plain = gain([answer(p, [1], lift=float(u)) for p, row in enumerate(lifts) for u in row], rights, 8)
    double = gain([answer(p, [1], lift=7.0 * float(u)) for p, row in enumerate(lifts) for u in row], rights, 8)
    difference = gain_over(plain, double, HOW)
    assert difference == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)
    twice = gain([answer(p, [1], lift=float(u)) for p, row in enumerate([*lifts, *lifts]) for u in row], rights * 2, 16)
    once, again = plain.score(HOW), twice.score(HOW)
    assert once is not None
    assert again is not None
    assert again["value"] == pytest.approx(once["value"])  # does not grow with the number of problems
    none = gain([answer(0, [1]), answer(0, [1])], [True, False], 1)
    assert none.score(HOW) is None
    assert gain_over(plain, none, HOW) is None


def test_first_order_changes_of_markers_and_length() -> None:
    figures = [
        answer(0, [1] * 50, markers_student=2.0, markers_target=1.0, ends_student=1.0, ends_target=2.0, distance=5.0),
        answer(1, [1] * 150, markers_student=8.0, markers_target=7.0, ends_student=1.0, ends_target=0.5),
    ]
    found = scored(figures, [True, False], {0: [True], 1: [False]})
    assert found["markers"]["value"] == pytest.approx(1000 * (8 - 10) / 200)
    assert found["markers_share"]["value"] == pytest.approx(8 / 10 - 1)
    assert found["ends"]["value"] == pytest.approx(1000 * (2.5 - 2) / 200)
    assert found["length_share"]["value"] == pytest.approx(2 / 2.5 - 1)
    assert found["distance"]["value"] == pytest.approx(5 / 200)
    own = score_student(figures, [True, False], 2, HOW)
    assert own["markers"]["value"] == pytest.approx(50.0)
    assert own["accuracy"]["value"] == 0.5


def test_accuracy_is_a_mean_over_problems_and_its_difference_is_paired() -> None:
    figures = [answer(0, [1]), answer(0, [2]), answer(1, [1]), answer(1, [2])]
    found = scored(figures, [True, False, False, False], {0: [True, True], 1: [False, True]})
    assert found["accuracy"]["value"] == pytest.approx(0.75)
    over = found["accuracy_over_student"]
    assert over == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})  # 0.5 on either problem


def test_statistics_of_the_signal_omit_undefined_tokens() -> None:
    figures = [answer(0, [1, 1, 1], norm_ratio=3.0, defined_norm_ratio=2.0)]
    found = scored(figures, [True], {0: [True]})
    assert found["norm_ratio"]["value"] == pytest.approx(1.5)
    assert found["cosine_question"] is None


def test_problems_with_right_and_wrong_answers_and_the_number_needed() -> None:
    assert problems_with_both([0, 0, 1, 1, 2], [True, False, True, True, False]) == {0}
    assert problems_needed([True, False], 2, 30) == 60  # half of all pairs are mixed
    assert problems_needed([True] + [False] * 9, 4, 30) == math.ceil(30 / (1 - 0.1**4 - 0.9**4))
    none_right = problems_needed([False] * 300, 4, 30)  # bound 3 / 300
    assert none_right == math.ceil(30 / (1 - 0.01**4 - 0.99**4))
    assert problems_needed([True] * 300, 4, 30) == none_right
