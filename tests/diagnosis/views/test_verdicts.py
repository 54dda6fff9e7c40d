"""The rules of the verdicts and their sentences."""

from __future__ import annotations

import pytest

from nemo_popsd.diagnosis.views.record import Score
from nemo_popsd.diagnosis.views.verdicts import Verdict, best, ranking, verdict


def score(value: float, half_width: float) -> Score:
    return {"value": value, "low": value - half_width, "high": value + half_width}


def scores(
    gain: Score | None, beats: Score | None, markers: Score | None, distance: float = 0.1
) -> dict[str, Score | None]:
    return {
        "gain": gain,
        "uncertain_teacher_over_reference": beats,
        "markers_share": markers,
        "distance": score(distance, 0.0),
    }


GAINS, BEATS, KEEPS = score(3.0, 1.0), score(0.03, 0.01), score(0.01, 0.02)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (scores(GAINS, BEATS, KEEPS), "helps"),
        (scores(GAINS, BEATS, None), "helps"),
        (scores(score(3.0, 4.0), BEATS, KEEPS), "undecided"),
        (scores(GAINS, score(0.03, 0.04), KEEPS), "undecided"),
        (scores(None, None, KEEPS), "undecided"),
        (scores(GAINS, BEATS, score(-0.3, 0.1)), "thinks less"),
        (scores(GAINS, BEATS, score(-0.3, 0.4)), "helps"),
        (scores(score(-3.0, 1.0), BEATS, score(-0.3, 0.1)), "harms"),
        (scores(GAINS, BEATS, KEEPS, distance=0.0), "nothing"),
    ],
)
def test_the_kind_of_a_verdict(found: dict[str, Score | None], kind: str) -> None:
    assert verdict("answer", found).kind == kind


def test_a_verdict_is_one_sentence_with_its_reasons() -> None:
    assert verdict("answer", scores(GAINS, BEATS, KEEPS)).sentence == (
        "answer: expected to help: to first order the accuracy changes by +3.0 [+2.0, +4.0] points per nat; the "
        "teacher beats the reference-only teacher where the student is uncertain (+0.030 [+0.020, +0.040]); markers "
        "change by +1 [-1, +3] %."
    )
    assert "loses against the reference-only teacher" in verdict("x", scores(GAINS, score(-0.3, 0.1), None)).sentence


def test_the_best_is_by_kind_then_by_gain() -> None:
    helps, more, harms, nothing = (
        Verdict("solution", "helps", "", 2.0),
        Verdict("answer", "helps", "", 3.0),
        Verdict("other", "harms", "", 9.0),
        Verdict("none", "nothing", "", 0.0),
    )
    assert ranking([nothing, harms, helps, more]) == [more, helps, harms, nothing]
    assert best([more, helps], score(1.0, 0.5)) == (
        "Best: answer; its gain is +1.0 [+0.5, +1.5] points above that of solution."
    )
    assert best([more, helps], score(1.0, 2.0)).endswith("solution, which is not significant.")
    assert best([helps], None) == "Best: solution."
    assert best([harms, nothing], None) == "None is expected to help; the best is other, which is expected to harm."
    undecided = Verdict("column", "undecided", "", 1.0)
    assert best([undecided], None) == ("None is expected to help at this number of problems; the best is column.")
