"""Scoring single responses, summarising an evaluation, and comparing evaluations side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from nemo_popsd.evaluation.answers import answers_match, extract_answer
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.markers import count_markers, rate_per_thousand


@dataclass(frozen=True, slots=True)
class SampleOutcome:
    """One response to one problem."""

    problem_id: str
    correct: bool
    answered: bool
    """An answer was found, right or wrong."""
    cut: bool
    """The response ended at the length limit and not at a stop token."""
    tokens: int
    """Response length, stop token included."""
    markers: Mapping[str, int]
    """Occurrences of each marker."""


def score_response(
    problem_id: str, text: str, expected: str, *, tokens: int, cut: bool, config: EvaluationConfig
) -> SampleOutcome:
    """Read one decoded response: its answer, compared with `expected`, and its markers."""
    answer = extract_answer(text, config.answer_pattern)
    return SampleOutcome(
        problem_id=problem_id,
        correct=answers_match(answer, expected),
        answered=answer is not None,
        cut=cut,
        tokens=tokens,
        markers=count_markers(text, config.markers),
    )


@dataclass(frozen=True)
class EvaluationSummary:
    """Aggregates over all samples; shares and accuracy are between 0 and 1."""

    problems: int
    samples: int
    accuracy: float
    """Mean over problems of the share of a problem's samples that are correct."""
    accuracy_stderr: float | None
    """Standard error of `accuracy` over problems (sample standard deviation / sqrt(problems)); None for one problem."""
    markers_per_1000_tokens: float
    """All markers together, over all response tokens (not a mean of per-response rates)."""
    marker_rates: dict[str, float]
    """The same for each marker."""
    mean_tokens: float
    """Mean response length in tokens."""
    cut_share: float
    """Share of samples cut at the length limit."""
    unanswered_share: float
    """Share of samples without an answer."""

    @classmethod
    def from_outcomes(cls, outcomes: Iterable[SampleOutcome]) -> EvaluationSummary:
        """Summarise; the order of outcomes does not matter, and problems may have unequal numbers of samples.

        Raises:
            ValueError: no outcomes.
        """
        samples = list(outcomes)
        if not samples:
            raise ValueError("no outcomes to summarise")
        by_problem: dict[str, list[bool]] = {}
        totals: dict[str, int] = {}
        for sample in samples:
            by_problem.setdefault(sample.problem_id, []).append(sample.correct)
            for marker, count in sample.markers.items():
                totals[marker] = totals.get(marker, 0) + count
        scores = [sum(correct) / len(correct) for correct in by_problem.values()]
        tokens = sum(sample.tokens for sample in samples)
        return cls(
            problems=len(scores),
            samples=len(samples),
            accuracy=math.fsum(scores) / len(scores),
            accuracy_stderr=_standard_error(scores),
            markers_per_1000_tokens=rate_per_thousand(sum(totals.values()), tokens),
            marker_rates={marker: rate_per_thousand(count, tokens) for marker, count in totals.items()},
            mean_tokens=tokens / len(samples),
            cut_share=sum(sample.cut for sample in samples) / len(samples),
            unanswered_share=sum(not sample.answered for sample in samples) / len(samples),
        )

    def as_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)


def comparison_table(summaries: Mapping[str, EvaluationSummary]) -> str:
    """Plain-text table, one column per summary under its name; two summaries get a column with the change.

    Accuracy and shares are in per cent, with the change in points.
    """
    columns = list(summaries.values())
    rows = [_header(list(summaries))]
    for label, values, unit in _measures(columns):
        cells = [_cell(value, unit) for value in values]
        if len(columns) == 2:
            cells.append(_change(values[0], values[1], unit))
        rows.append([label, *cells])
    rows.insert(2, ["standard error", *(_stderr(summary) for summary in columns), *([""] * (len(columns) == 2))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(_aligned(row, widths) for row in rows)


def _measures(columns: Sequence[EvaluationSummary]) -> list[tuple[str, list[float], str]]:
    """Label, one value per column (NaN where a column lacks it), and unit of each row."""
    markers = list(dict.fromkeys(marker for summary in columns for marker in summary.marker_rates))
    return [
        ("accuracy", [summary.accuracy for summary in columns], "%"),
        ("markers per 1,000 tokens", [summary.markers_per_1000_tokens for summary in columns], ""),
        *(
            (f"  {marker}", [summary.marker_rates.get(marker, math.nan) for summary in columns], "")
            for marker in markers
        ),
        ("mean response tokens", [summary.mean_tokens for summary in columns], "tokens"),
        ("cut at the limit", [summary.cut_share for summary in columns], "%"),
        ("without an answer", [summary.unanswered_share for summary in columns], "%"),
        ("problems", [float(summary.problems) for summary in columns], "count"),
        ("samples", [float(summary.samples) for summary in columns], "count"),
    ]


def _header(names: list[str]) -> list[str]:
    return ["", *names, *(["change"] if len(names) == 2 else [])]


def _cell(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    return {"%": f"{100 * value:.1f} %", "": f"{value:.2f}", "tokens": f"{value:,.1f}", "count": f"{value:,.0f}"}[unit]


def _change(before: float, after: float, unit: str) -> str:
    difference = after - before
    if math.isnan(difference):
        return "-"
    styles = {"%": f"{100 * difference:+.1f}", "": f"{difference:+.2f}", "tokens": f"{difference:+,.1f}", "count": ""}
    return styles[unit]


def _stderr(summary: EvaluationSummary) -> str:
    return "-" if summary.accuracy_stderr is None else f"± {100 * summary.accuracy_stderr:.1f} %"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _standard_error(scores: Sequence[float]) -> float | None:
    if len(scores) < 2:
        return None
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
