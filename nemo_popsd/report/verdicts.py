"""The three questions of a run, answered in a sentence each by stated rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemo_popsd.report.markup import fixed, signed
from nemo_popsd.report.run import AFTER, BEFORE, RunData

Z95 = 1.959964
KEPT = 0.10
"""Relative change of marker rate and of length up to which a run is said to have kept thinking."""


@dataclass(frozen=True)
class Interval:
    """A value with a 95 % interval; None where it was not measured."""

    value: float
    low: float | None
    high: float | None


def accuracy(values: dict[str, float] | None) -> Interval | None:
    """Accuracy in per cent, with value ± 1.96 standard errors."""
    if not values or "accuracy" not in values:
        return None
    value, error = 100 * values["accuracy"], values.get("accuracy_stderr")
    if error is None or not math.isfinite(error):
        return Interval(value, None, None)
    return Interval(value, value - 100 * Z95 * error, value + 100 * Z95 * error)


def accuracy_change(run: RunData) -> Interval | None:
    """After less before, in points. The interval takes the two as independent; drawn on the same problems they are
    not, so it is too wide rather than too narrow.
    """
    before, after = accuracy(run.before), accuracy(run.after)
    if before is None or after is None:
        return None
    change = after.value - before.value
    if before.low is None or after.low is None:
        return Interval(change, None, None)
    half = math.hypot(before.value - before.low, after.value - after.low)
    return Interval(change, change - half, change + half)


def accuracy_verdict(run: RunData) -> str:
    """Whether accuracy moved."""
    change = accuracy_change(run)
    if change is None:
        return "not measured"
    if change.low is None or change.high is None:
        return f"{signed(change.value)} points, with no interval"
    half = (change.high - change.low) / 2
    told = f"{signed(change.value)} ± {fixed(half)} points"
    if change.low > 0:
        return f"rose by {told}"
    if change.high < 0:
        return f"fell: {told}"
    return f"no change beyond its error: {told}"


def relative_change(run: RunData, name: str) -> float | None:
    """(after − before) / before of a validated figure."""
    before, after = (values.get(name) if values else None for values in (run.before, run.after))
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


def target_verdict(summary: dict[str, Any]) -> str:
    """What the target does to the markers of one token, all together."""
    found = [entry for entry in summary["push"]["markers"].values() if entry and entry["mass"]]
    if not found:
        return "no marker is one token of this vocabulary"
    push, mass = sum(entry["push"]["target"] or 0.0 for entry in found), sum(entry["mass"] for entry in found)
    share = push / mass
    direction = "raises" if share > 0.01 else "lowers" if share < -0.01 else "leaves alone"
    return f"{direction} the markers: {signed(100 * share, 0)} % of their probability, to first order"
