"""Statistics of a step over several responses to one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from nemo_popsd.training.siblings import SiblingSums, distinct_share, sibling_sums


def of_row(name: str, right: Sequence[bool] | None, *responses: list[int]) -> list[Any]:
    from nemo_popsd.rollout.engine import Rollout
    from nemo_popsd.training.trajectory import Trajectory
    from tests.training.runs import row

    prompt = row(0)
    own = replace(prompt, record=replace(prompt.record, id=name))
    verdicts = right or [None] * len(responses)
    return [
        Trajectory(own, Rollout(response, [0.0] * len(response), False, 0), right=verdict)
        for response, verdict in zip(responses, verdicts, strict=True)
    ]


def test_distinct_ngrams_of_a_question() -> None:
    assert distinct_share([[1, 2, 3, 4, 5]]) == 1
    assert distinct_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]) == 3 / 4
    assert distinct_share([[1, 2, 3, 4]] * 4) == 1 / 4
    assert distinct_share([[1], [1], [2]]) == 2 / 3
    assert distinct_share([[7] * 10]) == 1 / 7


def test_a_question_is_solved_by_one_right_response() -> None:
    listed = [
        *of_row("a", [True, False, True], [1, 9], [1, 8], [2, 9]),
        *of_row("b", [False, False], [1, 4], [1, 4]),
        *of_row("c", None, [3, 3]),
    ]
    sums = sibling_sums(listed[::-1])
    assert sums.distinct == pytest.approx(1 + 0.5 + 1)
    assert replace(sums, distinct=0) == SiblingSums(3, 0, graded_questions=2, solved=1)
