"""The rules that answer the three questions about a run with one phrase each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from nemo_popsd.diagnosis.schema import Summary
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Change, Evaluation, changes_between
from nemo_popsd.evaluation.records import EvaluationDirectory
from nemo_popsd.report.markup import signed
from nemo_popsd.report.run import AFTER, BEFORE, RunData, Validation

Z95 = 1.959964
KEPT = 0.10
"""Maximum relative change of marker rate and length for which the model is said to keep thinking."""

RESAMPLES = 10000
"""Number of bootstrap resamples if the run's configuration does not state it."""
UNCHANGED = 0.01
"""Maximum relative push on the markers for which the target is said not to change them."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval, which are None if the interval was not measured."""

    value: float
    low: float | None
    high: float | None


def estimate(validation: Validation | None, name: str, scale: float = 1.0) -> Interval | None:
    """A result times `scale`, with its stored interval or, for the accuracy, ± 1.96 standard errors."""
    if validation is None or name not in validation.values:
        return None
    value = scale * validation.values[name]
    if name in validation.intervals:
        low, high = validation.intervals[name]
        return Interval(value, scale * low, scale * high)
    error = validation.values.get("accuracy_stderr") if name == "accuracy" else None
    if error is None or not math.isfinite(error):
        return Interval(value, None, None)
    return Interval(value, value - scale * Z95 * error, value + scale * Z95 * error)


def accuracy(validation: Validation | None) -> Interval | None:
    """Accuracy in per cent."""
    return estimate(validation, "accuracy", 100.0)


def change(run: RunData, name: str, scale: float = 1.0) -> Interval | None:
    """The difference of a result between after and before training, times `scale`.

    If the scores of both evaluations are stored, the interval is a paired bootstrap over the problems. Otherwise it
    treats the two results as independent, which overestimates the interval for results on the same problems.
    """
    paired = paired_changes(run).get(name)
    if paired is not None:
        low, high = paired.interval
        return Interval(scale * paired.difference, scale * low, scale * high)
    before, after = estimate(run.before, name, scale), estimate(run.after, name, scale)
    if before is None or after is None:
        return None
    difference = after.value - before.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Interval(difference, None, None)
    below = math.hypot(before.high - before.value, after.value - after.low)
    above = math.hypot(before.value - before.low, after.high - after.value)
    return Interval(difference, difference - below, difference + above)


@lru_cache(maxsize=64)
def paired_changes(run: RunData) -> Mapping[str, Change]:
    """The change of each statistic between the first and the last evaluation of a run, over the common problems.

    Empty if the scores of an evaluation are not stored.
    """
    ends = [one.directory for one in (run.before, run.after) if one is not None and one.directory is not None]
    if len(ends) < 2:
        return {}
    try:
        before, after = (Evaluation.read(EvaluationDirectory(directory)) for directory in ends)
        return changes_between(before, after, resamples=run.setting("evaluation.resamples") or RESAMPLES)
    except (UserError, TypeError, ValueError):  # incomplete, by another version, or on other problems
        return {}


def accuracy_verdict(run: RunData) -> str:
    """Whether the accuracy changed, i.e. whether the interval of its change excludes 0."""
    difference = change(run, "accuracy", 100.0)
    if difference is None:
        return "not measured"
    if difference.low is None or difference.high is None:
        return f"{signed(difference.value)} points, without an interval"
    points = f"{signed(difference.value)} points [{signed(difference.low)}, {signed(difference.high)}]"
    if difference.low > 0:
        return f"rose: {points}"
    if difference.high < 0:
        return f"fell: {points}"
    return f"no significant change: {points}"


def relative_change(run: RunData, name: str) -> float | None:
    """(after − before) / before of a result."""
    before, after = (one.values.get(name) if one else None for one in (run.before, run.after))
    if before is None or after is None or not before:
        return None
    return after / before - 1


def thinking_verdict(run: RunData) -> str:
    """Whether the model kept thinking, i.e. whether marker rate and length changed by at most `KEPT`."""
    markers, length = (relative_change(run, name) for name in ("markers_per_1000_tokens", "mean_tokens"))
    if markers is None or length is None:
        return "not measured"
    changes = f"markers {signed(100 * markers, 0)} %, length {signed(100 * length, 0)} %"
    if max(abs(markers), abs(length)) <= KEPT:
        return f"kept thinking: {changes}"
    if min(markers, length) < -KEPT:
        return f"thinks less: {changes}"
    return f"thinks more: {changes}"


def target_summary(run: RunData) -> Summary | None:
    """The summary of the diagnosis before training, otherwise that of any other diagnosis."""
    for name in (BEFORE, AFTER, *run.diagnoses):
        if name in run.diagnoses:
            return run.diagnoses[name].summary
    return None


def marker_share(summary: Summary, component: str) -> float | None:
    """First-order relative change of the probability of all single-token markers along a component; None if the
    vocabulary has no such marker, or their probability is 0.
    """
    markers = [entry for entry in summary["push"]["markers"].values() if entry and entry["mass"]]
    mass = sum(entry["mass"] or 0.0 for entry in markers)
    return sum(entry["push"][component] or 0.0 for entry in markers) / mass if mass else None


def target_verdict(summary: Summary) -> str:
    """The effect of the target on the probability of all single-token markers."""
    share = marker_share(summary, "target")
    if share is None:
        return "no marker is a single token of this vocabulary"
    direction = "raises" if share > UNCHANGED else "lowers" if share < -UNCHANGED else "does not change"
    return f"{direction} the markers: {signed(100 * share, 0)} % of their probability"
