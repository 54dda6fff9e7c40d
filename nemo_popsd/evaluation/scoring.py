"""Scoring of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nemo_popsd.evaluation.answers import extract_answer
from nemo_popsd.evaluation.behaviour import (
    closes_thinking,
    ends_in_loop,
    reflection_segments,
    repeated_share,
    words_of,
)
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.evaluation.records import Sample, SampleScore


def score_samples(
    samples: Iterable[Sample], answers: Mapping[str, str], config: EvaluationConfig, verifier: AnswerVerifier
) -> list[SampleScore]:
    """Scores every sample, in the order of `samples`.

    Args:
        samples: all samples of each problem, so that votes can be numbered.
        answers: expected answer by problem id.
        config: scoring settings.
        verifier: compares answers.
    """
    voted: dict[str, list[tuple[str, bool]]] = {}
    return [_score(s, answers[s.problem], config, verifier, voted.setdefault(s.problem, [])) for s in samples]


def _score(
    sample: Sample, expected: str, config: EvaluationConfig, verifier: AnswerVerifier, voted: list[tuple[str, bool]]
) -> SampleScore:
    answer = extract_answer(sample.text, config.answer_pattern, last_number=config.without_box == "last_number")
    verdict = verifier.compare(answer, expected)
    words = words_of(sample.text)
    return SampleScore(
        problem=sample.problem,
        sample=sample.sample,
        answer=answer,
        correct=verdict.correct,
        decided_by=verdict.decided_by,
        vote=None if answer is None else _vote(answer, verdict.correct, verifier, voted),
        truncated=sample.truncated,
        tokens=sample.tokens,
        markers=count_markers(sample.text, config.markers),
        segments=reflection_segments(sample.text, config.markers),
        closed_thinking=closes_thinking(sample.text, config.thinking_end),
        repeated=repeated_share(words),
        looping=ends_in_loop(words),
    )


def _vote(answer: str, correct: bool, verifier: AnswerVerifier, voted: list[tuple[str, bool]]) -> int:
    """Index of `answer` among the distinct answers `voted` to its problem; a new answer is appended."""
    for number, (other, other_correct) in enumerate(voted):
        if correct == other_correct and (correct or answer == other or verifier.compare(answer, other).correct):
            return number
    voted.append((answer, correct))
    return len(voted) - 1
