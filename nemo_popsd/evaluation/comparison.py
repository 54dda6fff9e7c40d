"""Comparison of evaluations, with intervals for the statistics and for their changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES
from nemo_popsd.evaluation.estimates import Interval, Ratio, changes, interval, resampled
from nemo_popsd.evaluation.records import EvaluationDirectory, SampleScore
from nemo_popsd.evaluation.rescoring import rescored
from nemo_popsd.evaluation.summary import RESAMPLING_SEED, EvaluationSummary, figures_of
from nemo_popsd.files.json_files import as_dataclass, damaged

_LABELS = {
    "accuracy": ("accuracy (avg@{k})", "%"),
    "majority": ("majority@{k}", "%"),
    "markers_per_1000_tokens": ("markers per 1,000 tokens", ""),
    "segments": ("reflection segments per answer", ""),
    "mean_tokens": ("mean response tokens", "tokens"),
    "closed_thinking_share": ("closed thinking", "%"),
    "repeated_share": ("repeated word sequences", "%"),
    "looping_share": ("ends in a loop", "%"),
    "cut_share": ("truncated at the limit", "%"),
    "unanswered_share": ("without an answer", "%"),
    "undecided_share": ("comparison undecided", "%"),
}


@dataclass(frozen=True)
class Evaluation:
    """A concluded evaluation of one problem set."""

    summary: EvaluationSummary
    scores: tuple[SampleScore, ...]
    checker: str = ""
    """Name of the answer checker that scored the samples; empty for the rules of this package."""

    @classmethod
    def of(cls, scores: Sequence[SampleScore], config: EvaluationConfig) -> Evaluation:
        """Summarises `scores`."""
        return cls(EvaluationSummary.from_scores(scores, config), tuple(scores), config.checker)

    @classmethod
    def read(cls, directory: EvaluationDirectory) -> Evaluation:
        """Reads a concluded evaluation; scores samples again if other comparison rules scored them.

        Raises:
            UserError: the evaluation has not been concluded, or samples that must be scored again are missing.
        """
        written = directory.summary()
        scoring = written.get("scoring", {})
        checker = scoring.get("checker", "")
        if not checker and scoring.get("comparison") != COMPARISON_RULES:
            return cls.of(*rescored(directory))
        fields = {k: v for k, v in written.items() if k in EvaluationSummary.__dataclass_fields__}
        summary = as_dataclass(EvaluationSummary, fields, directory.path)
        if any(len(ends) != 2 for ends in summary.intervals.values()):
            raise damaged(directory.path, "an interval without two ends")
        return cls(summary, tuple(directory.scores()), checker)


@dataclass(frozen=True)
class Change:
    """The difference of a statistic between two evaluations, over their common problems."""

    difference: float
    interval: Interval
    """Paired bootstrap interval: both evaluations are resampled with the same problems."""


def changes_between(before: Evaluation, after: Evaluation, *, resamples: int) -> dict[str, Change]:
    """`after` − `before` for each common statistic, over the common problems.

    Raises:
        UserError: there is no common problem.
    """
    old, new = _paired(before, after)
    between = changes(old, new, resamples=resamples, confidence=before.summary.confidence, seed=RESAMPLING_SEED)
    return {name: Change(new[name].value - old[name].value, ends) for name, ends in between.items()}


def comparison_table(evaluations: Mapping[str, Evaluation], *, resamples: int) -> str:
    """Plain-text table: a column per evaluation, and a column for the change of each relative to the first.

    Accuracies and shares are in per cent, their changes in points; intervals are in brackets. Changes are over the
    common problems of both evaluations; if these are not all problems, a line below states their number.
    """
    columns = list(evaluations.values())
    first, *others = columns
    compared = [changes_between(first, other, resamples=resamples) for other in others]
    names = list(evaluations)
    headings = ["change"] if len(others) == 1 else [f"{name} − {names[0]}" for name in names[1:]]  # noqa: RUF001
    rows = [["", *names, *headings]]
    statistics = [_statistics(evaluation.summary) for evaluation in columns]
    for name in dict.fromkeys(name for values in statistics for name in values):
        label, unit = _label(name, columns)
        cells = [
            _cell(values.get(name), column.summary.intervals.get(name), unit)
            for values, column in zip(statistics, columns, strict=True)
        ]
        cells += [_change(change.get(name), unit) for change in compared]
        rows.append([label, *cells])
    rows.append(["problems", *(f"{column.summary.problems:,}" for column in columns), *([""] * len(others))])
    rows.append(["samples", *(f"{column.summary.samples:,}" for column in columns), *([""] * len(others))])
    lines = _aligned(rows)
    lines.append(f"in brackets: {100 * first.summary.confidence:g} % bootstrap intervals over problems")
    for name, other in zip(names[1:], others, strict=True):
        common = len(_problems(first) & _problems(other))
        if common < max(first.summary.problems, other.summary.problems):
            lines.append(f"change of {name}: over the {common} problems that both have")
    return "\n".join(lines)


@dataclass(frozen=True)
class Average:
    """A statistic averaged over sets with equal weights."""

    value: float
    interval: Interval
    """Bootstrap interval over problems; sets are resampled independently of each other."""
    change: Change | None
    """Change relative to the base, over the common problems; None without a base."""


def average(name: str, sets: Sequence[Evaluation], base: Sequence[Evaluation] | None, *, resamples: int) -> Average:
    """A statistic of one model averaged over sets with equal weights, as the paper reports the accuracy.

    Args:
        name: name of the statistic in `EvaluationSummary`.
        sets: evaluations of the model, one per set.
        base: evaluations to compare with, for the same sets in the same order.
        resamples: number of resamples of each set.

    Raises:
        UserError: the evaluations of a set have no problem in common, or were scored by different checkers.
    """
    confidence = sets[0].summary.confidence
    value, ends = _mean([figures_of(one.scores)[name] for one in sets], None, resamples, confidence)
    if base is None:
        return Average(value, ends, None)
    pairs = [_paired(before, after) for before, after in zip(base, sets, strict=True)]
    changed = _mean([new[name] for _, new in pairs], [old[name] for old, _ in pairs], resamples, confidence)
    return Average(value, ends, Change(*changed))


def average_over_sets(sets: Mapping[str, Mapping[str, Evaluation]], *, resamples: int) -> str:
    """Accuracy averaged over sets (see `average`), as lines of text.

    Args:
        sets: evaluations by set, then by model; every set has the same models. With several models, the text includes
            the change relative to the first one.
        resamples: number of resamples of each set.
    """
    models = list(next(iter(sets.values())))
    by_model = {model: [by_name[model] for by_name in sets.values()] for model in models}
    lines = [f"accuracy, average of {', '.join(sets)}"]
    for model, evaluations in by_model.items():
        base = None if model == models[0] else by_model[models[0]]
        found = average("accuracy", evaluations, base, resamples=resamples)
        low, high = found.interval
        line = f"  {model}: {100 * found.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        if found.change is not None:
            low, high = found.change.interval
            line += f", change {100 * found.change.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        lines.append(line)
    return "\n".join(lines)


def read_evaluations(path: str | Path) -> dict[str, Evaluation]:
    """The evaluations in `path` by set: the directory of one evaluation, or of a model with one for each set.

    Raises:
        UserError: `path` contains no concluded evaluation.
    """
    directory = Path(path)
    sets = sorted(summary.parent for summary in directory.glob("*/summary.json"))
    if (directory / "summary.json").is_file() or not sets:
        return {directory.name: Evaluation.read(EvaluationDirectory(directory))}
    return {one.name: Evaluation.read(EvaluationDirectory(one)) for one in sets}


def compare_directories(paths: Sequence[str], *, resamples: int, base: str | None = None) -> str:
    """The tables of several evaluations: the name of the base, a table for each common set, and the average.

    Args:
        paths: directories of evaluations.
        resamples: number of resamples for each interval.
        base: the evaluation with which the others are compared: its name in the tables, the last part of the name, or
            its path. None means the first.

    Raises:
        UserError: a path contains no concluded evaluation, there is no common set, or `base` is not one of the paths.
    """
    names = {path: _short(path, paths) for path in paths}
    read = {path: read_evaluations(path) for path in paths}
    first = paths[0] if base is None else _chosen(base, names)
    evaluations = {names[path]: read[path] for path in [first, *(path for path in paths if path != first)]}
    origin = "the first argument; --base NAME selects another" if base is None else "by --base"
    title = f"base: {names[first]} ({origin})\n\n" if len(paths) > 1 else ""
    single = all(len(sets) == 1 for sets in evaluations.values())
    if single:  # the names of the sets may differ; common problems are checked
        only = {name: next(iter(sets.values())) for name, sets in evaluations.items()}
        return title + comparison_table(only, resamples=resamples)
    common = [name for name in next(iter(evaluations.values())) if all(name in sets for sets in evaluations.values())]
    if not common:
        raise UserError(
            "comparison",
            got="; ".join(f"{name} with {', '.join(sets)}" for name, sets in evaluations.items()),
            need="a problem set that all have",
            fix="name other directories",
        )
    by_set = {name: {model: sets[name] for model, sets in evaluations.items()} for name in common}
    return title + tables_of_sets(by_set, resamples=resamples)


def tables_of_sets(by_set: Mapping[str, Mapping[str, Evaluation]], *, resamples: int) -> str:
    """A table for each set under its name, and the average if there are several sets."""
    parts = [f"{name}\n{comparison_table(models, resamples=resamples)}" for name, models in by_set.items()]
    if len(by_set) > 1:
        parts.append(average_over_sets(by_set, resamples=resamples))
    return "\n\n".join(parts)


def _short(path: str, paths: Sequence[str]) -> str:
    """The shortest end of `path` that distinguishes it from the others."""
    parts = [Path(other).absolute().parts for other in paths]
    own = Path(path).absolute().parts
    for length in range(1, len(own) + 1):
        if sum(other[-length:] == own[-length:] for other in parts) == 1:
            return "/".join(own[-length:])
    raise UserError("comparison", got=f"{path!r} twice", need="different directories", fix="name each once")


def _chosen(base: str, names: Mapping[str, str]) -> str:
    """The path that `base` refers to.

    Raises:
        UserError: no path matches, or several do.
    """
    wanted = Path(base).absolute()
    matches = [path for path, name in names.items() if base == name or wanted == Path(path).absolute()]
    matches = matches or [path for path in names if Path(path).absolute().name == base]
    if len(matches) != 1:
        raise UserError(
            "comparison",
            got=f"--base {base}, which names {'several' if matches else 'none'} of the evaluations",
            need=f"one of {', '.join(names.values())}",
            fix="set --base to one of these names",
        )
    return matches[0]


def _paired(before: Evaluation, after: Evaluation) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    if before.checker != after.checker:
        raise UserError(
            "comparison",
            got=f"scores by evaluation.checker={before.checker!r} and by {after.checker!r}",
            need="scores by the same checker",
            fix="run `popsd evaluate` again for one of them, with the checker of the other",
        )
    common = _problems(before) & _problems(after)
    if not common:
        raise UserError(
            "comparison",
            got="evaluations of different problems",
            need="at least one problem that both have",
            fix="compare evaluations of the same set",
        )
    old, new = (figures_of([s for s in side.scores if s.problem in common]) for side in (before, after))
    return old, new


def _problems(evaluation: Evaluation) -> set[str]:
    return {score.problem for score in evaluation.scores}


def _mean(
    ratios: Sequence[Ratio], baseline: Sequence[Ratio] | None, resamples: int, confidence: float
) -> tuple[float, Interval]:
    """Mean of a statistic over several sets, minus that of `baseline`; each set is resampled with its own seed."""
    total, value = np.zeros(resamples), 0.0
    for index, ratio in enumerate(ratios):
        seed = RESAMPLING_SEED + index
        total += resampled([ratio], resamples=resamples, seed=seed)[:, 0]
        value += ratio.value
        if baseline is not None:
            total -= resampled([baseline[index]], resamples=resamples, seed=seed)[:, 0]
            value -= baseline[index].value
    return value / len(ratios), interval(total / len(ratios), confidence)


def _statistics(summary: EvaluationSummary) -> dict[str, float]:
    """The statistics of a summary in the order of the table."""
    values: dict[str, float] = {}
    for name in _LABELS:
        values[name] = getattr(summary, name)
        if name == "accuracy":
            values |= {f"pass_at.{k}": value for k, value in summary.pass_at.items()}
        if name == "markers_per_1000_tokens":
            values |= {f"marker_rates.{marker}": value for marker, value in summary.marker_rates.items()}
    return values


def _label(name: str, columns: Sequence[Evaluation]) -> tuple[str, str]:
    if name.startswith("pass_at."):
        return f"pass@{name.removeprefix('pass_at.')}", "%"
    if name.startswith("marker_rates."):
        return f"  {name.removeprefix('marker_rates.')}", ""
    label, unit = _LABELS[name]
    counts = sorted({column.summary.samples_per_problem for column in columns})
    return label.format(k="/".join(map(str, counts))), unit


def _cell(value: float | None, between: Sequence[float] | None, unit: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    shown = {"%": f"{100 * value:.1f} %", "": f"{value:.2f}", "tokens": f"{value:,.1f}"}[unit]
    return shown if between is None else f"{shown} [{_number(between[0], unit)}, {_number(between[1], unit)}]"


def _change(change: Change | None, unit: str) -> str:
    if change is None:
        return "-"
    low, high = (_number(value, unit, sign="+") for value in change.interval)
    return f"{_number(change.difference, unit, sign='+')} [{low}, {high}]"


def _number(value: float, unit: str, sign: str = "") -> str:
    return {"%": f"{100 * value:{sign}.1f}", "": f"{value:{sign}.2f}", "tokens": f"{value:{sign},.1f}"}[unit]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
