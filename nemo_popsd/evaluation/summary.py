"""The summary of an evaluation: statistics over problems, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.estimates import Ratio, intervals, majority_is_correct, pass_at_k
from nemo_popsd.evaluation.records import SampleScore

RESAMPLING_SEED = 0
"""Seed of all intervals: the same scores have the same intervals, independent of the run's seed."""


@dataclass(frozen=True)
class EvaluationSummary:
    """Statistics over all samples; shares and accuracies are between 0 and 1. All fields are JSON values."""

    problems: int
    """Number of problems."""
    samples: int
    """Number of samples, over all problems."""
    samples_per_problem: int
    """Smallest number of samples of a problem: the k of avg@k and of majority@k."""
    accuracy: float
    """avg@k: mean over problems of the share of a problem's samples that are correct; an estimate of pass@1."""
    accuracy_stderr: float | None
    """Standard error of `accuracy` over problems (sample standard deviation / sqrt(problems)); None for one problem."""
    majority: float
    """majority@k: mean over problems of whether the most frequent answer is correct."""
    pass_at: dict[str, float]
    """pass@k by k: mean over problems of the unbiased estimate."""
    markers_per_1000_tokens: float
    """Rate of all markers over all response tokens (not a mean of per-response rates)."""
    marker_rates: dict[str, float]
    """Rate of each marker."""
    segments: float
    """Reflection segments per response."""
    mean_tokens: float
    """Mean response length in tokens."""
    closed_thinking_share: float
    """Share of samples that close their thinking."""
    repeated_share: float
    """Mean share of a response's word sequences that occurred earlier in it."""
    looping_share: float
    """Share of samples that end in a loop."""
    cut_share: float
    """Share of samples truncated at the length limit."""
    unanswered_share: float
    """Share of samples without an answer."""
    undecided_share: float
    """Share of samples whose comparison was aborted, e.g. by the time limit; they count as wrong."""
    confidence: float
    """Confidence level of the intervals."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """[low, high] by name of the statistic; statistics in mappings are named `pass_at.K` and `marker_rates.MARKER`."""

    @classmethod
    def from_scores(cls, scores: Iterable[SampleScore], config: EvaluationConfig) -> EvaluationSummary:
        """Summarises `scores` in any order; problems may have different numbers of samples.

        Raises:
            ValueError: there are no scores.
        """
        samples = list(scores)
        if not samples:
            raise ValueError("no samples to summarise")
        ratios = figures_of(samples, config.pass_k)
        of_problems = intervals(ratios, resamples=config.resamples, confidence=config.confidence, seed=RESAMPLING_SEED)
        values = {name: ratio.value for name, ratio in ratios.items()}
        return cls(
            problems=len(ratios["accuracy"].numerators),
            samples=len(samples),
            samples_per_problem=int(min(ratios["mean_tokens"].denominators)),
            accuracy=values["accuracy"],
            accuracy_stderr=_standard_error(ratios["accuracy"].numerators),
            majority=values["majority"],
            pass_at=_inner(values, "pass_at"),
            markers_per_1000_tokens=values["markers_per_1000_tokens"],
            marker_rates=_inner(values, "marker_rates"),
            segments=values["segments"],
            mean_tokens=values["mean_tokens"],
            closed_thinking_share=values["closed_thinking_share"],
            repeated_share=values["repeated_share"],
            looping_share=values["looping_share"],
            cut_share=values["cut_share"],
            unanswered_share=values["unanswered_share"],
            undecided_share=values["undecided_share"],
            confidence=config.confidence,
            intervals={name: list(ends) for name, ends in of_problems.items()},
        )

    def as_dict(self) -> dict[str, object]:
        """All fields as JSON values, as accepted by `EvaluationSummary`."""
        return asdict(self)

    def numbers(self) -> dict[str, float]:
        """The statistics for loggers; those in mappings are named `pass_at/K` and `marker_rates/MARKER`."""
        values: dict[str, float] = {}
        for name, value in self.as_dict().items():
            if name in ("pass_at", "marker_rates"):
                values |= {f"{name}/{key}": float(number) for key, number in getattr(self, name).items()}
            elif name != "confidence" and isinstance(value, int | float):
                values[name] = float(value)
        return values


def figures_of(scores: Sequence[SampleScore], pass_k: Sequence[int] = ()) -> dict[str, Ratio]:
    """Every statistic of a summary by name, over the problems in the order of their ids.

    Args:
        scores: scores of at least one sample.
        pass_k: values of k for pass@k; those above the number of samples are omitted. Empty means 2, 4, 8, ... and that
            number.
    """
    by_problem: dict[str, list[SampleScore]] = {}
    for score in scores:
        by_problem.setdefault(score.problem, []).append(score)
    problems = [by_problem[name] for name in sorted(by_problem)]
    fewest = min(map(len, problems))
    ones, counts = [1.0] * len(problems), [float(len(of)) for of in problems]
    tokens = [float(sum(score.tokens for score in of)) for of in problems]
    correct = [sum(score.correct for score in of) for of in problems]

    def per_sample(values: Sequence[Sequence[float]]) -> Ratio:
        return Ratio([math.fsum(of) for of in values], counts)

    def per_thousand(occurrences: Sequence[int]) -> Ratio:
        return Ratio([1000.0 * count for count in occurrences], tokens)

    ratios = {
        "accuracy": Ratio([right / len(of) for right, of in zip(correct, problems, strict=True)], ones),
        "majority": Ratio(
            [majority_is_correct([s.vote for s in of], [s.correct for s in of]) for of in problems], ones
        ),
    }
    for k in _shown(pass_k, fewest):
        estimates = [pass_at_k(len(of), right, k) for right, of in zip(correct, problems, strict=True)]
        ratios[f"pass_at.{k}"] = Ratio(estimates, ones)
    ratios["markers_per_1000_tokens"] = per_thousand([sum(sum(s.markers.values()) for s in of) for of in problems])
    for marker in dict.fromkeys(marker for score in scores for marker in score.markers):
        ratios[f"marker_rates.{marker}"] = per_thousand([sum(s.markers.get(marker, 0) for s in of) for of in problems])
    ratios["segments"] = per_sample([[s.segments for s in of] for of in problems])
    ratios["mean_tokens"] = per_sample([[s.tokens for s in of] for of in problems])
    ratios["closed_thinking_share"] = per_sample([[s.closed_thinking for s in of] for of in problems])
    ratios["repeated_share"] = per_sample([[s.repeated for s in of] for of in problems])
    ratios["looping_share"] = per_sample([[s.looping for s in of] for of in problems])
    ratios["cut_share"] = per_sample([[s.truncated for s in of] for of in problems])
    ratios["unanswered_share"] = per_sample([[s.answer is None for s in of] for of in problems])
    undecided = [[s.decided_by in ("timeout", "crash") for s in of] for of in problems]
    ratios["undecided_share"] = per_sample(undecided)
    return ratios


def _shown(pass_k: Sequence[int], fewest: int) -> list[int]:
    if pass_k:
        return sorted({k for k in pass_k if k <= fewest})
    powers = {2**power for power in range(fewest.bit_length())}
    return sorted({*powers, fewest} - {1})


def _inner(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(f"{prefix}."): value for name, value in values.items() if name.startswith(f"{prefix}.")}


def _standard_error(scores: Sequence[float]) -> float | None:
    if len(scores) < 2:
        return None
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
