from __future__ import annotations

from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier
from nemo_popsd.evaluation.records import Sample, SampleScore
from nemo_popsd.evaluation.scoring import score_samples


def scored(*texts: str, expected: str = "1/2", **settings: object) -> list[SampleScore]:
    samples = [Sample("p", number, text, tokens=9, truncated=False) for number, text in enumerate(texts)]
    with AnswerVerifier(seconds=20) as verifier:
        return score_samples(samples, {"p": expected}, EvaluationConfig(**settings), verifier)  # type: ignore[arg-type]


def test_all_fields_of_a_score() -> None:
    (found,) = scored(r"Wait, no. Hmm. So it is.</think> \boxed{0.5}", markers=["Wait", "Hmm"])
    assert found == SampleScore(
        problem="p",
        sample=0,
        answer="0.5",
        correct=True,
        decided_by="exact",
        vote=0,
        truncated=False,
        tokens=9,
        markers={"Wait": 1, "Hmm": 1},
        segments=1,
        closed_thinking=True,
        repeated=0.0,
        looping=False,
    )


def test_a_response_without_an_answer() -> None:
    (found,) = scored(r"so it is 0.5, \boxed{")
    assert (found.answer, found.correct, found.decided_by, found.vote) == (None, False, "missing", None)
    (found,) = scored("so it is 0.5", without_box="last_number")
    assert (found.answer, found.correct) == ("0.5", True)
    (found,) = scored("#### 1/2", answer_pattern=r"####\s*(.+)")
    assert found.correct


def test_equal_answers_share_a_vote() -> None:
    texts = [
        r"\boxed{0.5}",
        r"\boxed{7}",
        r"\boxed{\frac12}",
        r"\boxed{\sqrt{49}}",
        "none",
        r"\boxed{8}",
        r"\boxed{8.0}",
    ]
    assert [found.vote for found in scored(*texts)] == [0, 1, 0, 1, None, 2, 2]


def test_votes_are_counted_for_each_problem() -> None:
    samples = [Sample(problem, 0, r"\boxed{3}", tokens=1, truncated=False) for problem in ("p", "q")]
    with AnswerVerifier(seconds=20) as verifier:
        found = score_samples(samples, {"p": "3", "q": "4"}, EvaluationConfig(), verifier)
    assert [(one.correct, one.vote) for one in found] == [(True, 0), (False, 0)]


def test_another_tag_can_close_the_thinking() -> None:
    (found,) = scored("so[/THINK]", thinking_end="[/THINK]")
    assert found.closed_thinking
