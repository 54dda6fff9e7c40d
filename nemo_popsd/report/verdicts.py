"""The three questions of a run, answered in a sentence each by stated rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Change, Evaluation, changes_between
from nemo_popsd.evaluation.records import EvaluationDirectory
from nemo_popsd.report.markup import signed
from nemo_popsd.report.run import AFTER, BEFORE, RunData, Validation

Z95 = 1.959964
KEPT = 0.10
"""Relative change of marker rate and of length up to which a run is said to have kept thinking."""

RESAMPLES = 10000
"""Of the problems, where a run's configuration does not say."""
LEFT_ALONE = 0.01
"""Relative push on the markers up to which a target is said to leave them alone."""


@dataclass(frozen=True)
class Interval:
    """A value with a 95 % interval; None where it was not measured."""

    value: float
    low: float | None
    high: float | None


def estimate(found: Validation | None, name: str, scale: float = 1.0) -> Interval | None:
    """A validated figure times `scale`, with the interval on disk; else, for accuracy, ± 1.96 standard errors."""
    if found is None or name not in found.values:
        return None
    value = scale * found.values[name]
    if name in found.intervals:
        low, high = found.intervals[name]
        return Interval(value, scale * low, scale * high)
    error = found.values.get("accuracy_stderr") if name == "accuracy" else None
    if error is None or not math.isfinite(error):
        return Interval(value, None, None)
    return Interval(value, value - scale * Z95 * error, value + scale * Z95 * error)


def accuracy(found: Validation | None) -> Interval | None:
    """Accuracy in per cent."""
    return estimate(found, "accuracy", 100.0)


def change(run: RunData, name: str, scale: float = 1.0) -> Interval | None:
    """A figure after training less the same before, times `scale`.

    With the scores of both on disk, its interval is a bootstrap over the problems, paired. Without, it takes the two as
    independent; drawn on the same problems they are not, so it is too wide rather than too narrow.
    """
    paired = paired_changes(run).get(name)
    if paired is not None:
        low, high = paired.interval
        return Interval(scale * paired.difference, scale * low, scale * high)
    before, after = estimate(run.before, name, scale), estimate(run.after, name, scale)
    if before is None or after is None:
        return None
    moved = after.value - before.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Interval(moved, None, None)
    below = math.hypot(before.high - before.value, after.value - after.low)
    above = math.hypot(before.value - before.low, after.high - after.value)
    return Interval(moved, moved - below, moved + above)


@lru_cache(maxsize=64)
def paired_changes(run: RunData) -> Mapping[str, Change]:
    """How each figure differs between the first and the last evaluation of a run, over the problems of both; empty
    where the scores of one are not on disk.
    """
    ends = [found.directory for found in (run.before, run.after) if found is not None and found.directory is not None]
    if len(ends) < 2:
        return {}
    try:
        before, after = (Evaluation.read(EvaluationDirectory(directory)) for directory in ends)
        return changes_between(before, after, resamples=run.setting("evaluation.resamples") or RESAMPLES)
    except (UserError, TypeError, ValueError):  # cut off, of another version, or of other problems
        return {}


def accuracy_verdict(run: RunData) -> str:
    """Whether accuracy moved: whether the interval of its change leaves 0 out."""
    moved = change(run, "accuracy", 100.0)
    if moved is None:
        return "not measured"
    if moved.low is None or moved.high is None:
        return f"{signed(moved.value)} points, with no interval"
    told = f"{signed(moved.value)} points [{signed(moved.low)}, {signed(moved.high)}]"
    if moved.low > 0:
        return f"rose: {told}"
    if moved.high < 0:
        return f"fell: {told}"
    return f"no change beyond its error: {told}"


def relative_change(run: RunData, name: str) -> float | None:
    """(after − before) / before of a validated figure."""
    before, after = (found.values.get(name) if found else None for found in (run.before, run.after))
    if before is None or after is None or not before:
        return None
    return after / before - 1


def thinking_verdict(run: RunData) -> str:
    """Whether the model kept thinking: neither marker rate nor length moved by more than `KEPT`."""
    markers, length = (relative_change(run, name) for name in ("markers_per_1000_tokens", "mean_tokens"))
    if markers is None or length is None:
        return "not measured"
    told = f"markers {signed(100 * markers, 0)} %, length {signed(100 * length, 0)} %"
    if max(abs(markers), abs(length)) <= KEPT:
        return f"kept thinking: {told}"
    if min(markers, length) < -KEPT:
        return f"thinks less: {told}"
    return f"thinks more: {told}"


def target_summary(run: RunData) -> dict[str, Any] | None:
    """The diagnosis that says what the target pushes: that before training, else any other."""
    for name in (BEFORE, AFTER, *run.diagnoses):
        if name in run.diagnoses:
            return run.diagnoses[name].summary
    return None


def marker_share(summary: dict[str, Any], component: str) -> float | None:
    """First-order change of the probability of all markers of one token along a component, relative to it; None where
    the vocabulary has no such marker, or the student never considers one.
    """
    found = [entry for entry in summary["push"]["markers"].values() if entry and entry["mass"]]
    mass = sum(entry["mass"] for entry in found)
    return sum(entry["push"][component] or 0.0 for entry in found) / mass if mass else None


def target_verdict(summary: dict[str, Any]) -> str:
    """What the target does to the markers of one token, all together."""
    share = marker_share(summary, "target")
    if share is None:
        return "no marker is one token of this vocabulary"
    direction = "raises" if share > LEFT_ALONE else "lowers" if share < -LEFT_ALONE else "leaves alone"
    return f"{direction} the markers: {signed(100 * share, 0)} % of their probability"
