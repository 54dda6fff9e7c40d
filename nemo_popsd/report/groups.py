"""Names and lines for several runs: distinct labels for runs with the same name, and means over the seeds of an arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemo_popsd.report.arms import Mean, arms
from nemo_popsd.report.plots import Series, series_class
from nemo_popsd.report.run import NOT_OF_AN_ARM, RunData, flat_settings

_MOST_NAMED = 3
Band = list[tuple[float, float, float]]


def told_apart(runs: Sequence[RunData]) -> list[RunData]:
    """The runs; runs that share a name have a label with the settings in which they differ, or their directories."""
    labelled = []
    for run in runs:
        others = [other for other in runs if other is not run and other.name == run.name]
        labelled.append(replace(run, label=f"{run.name} ({_label(run, others)})") if others else run)
    return labelled


def _label(run: RunData, others: Sequence[RunData]) -> str:
    own, rest = flat_settings(run.config), [flat_settings(other.config) for other in others]
    ignored = [name for name in NOT_OF_AN_ARM if name != "seed"]
    names = {name for settings in (own, *rest) for name in settings} - set(ignored)
    differing = sorted(name for name in names if any(settings.get(name) != own.get(name) for settings in rest))
    if not differing:
        return run.directory.name
    words = [f"{name.rpartition('.')[2]}={_short(own.get(name))}" for name in differing[:_MOST_NAMED]]
    return ", ".join(words) + (", …" if len(differing) > _MOST_NAMED else "")


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"…{text[-31:]}"


@dataclass(frozen=True)
class Group:
    """Runs drawn as one line."""

    label: str
    css: str
    """Colour class."""
    runs: Sequence[RunData]

    def series(self, curve: Callable[[RunData], Sequence[tuple[float, float]]], band: Band | None = None) -> Series:
        """The line of a single run with `band`, or the mean of several runs with its 95 % interval over seeds.

        A mean covers only the steps that all runs have.

        Args:
            curve: returns the points (x, y) of a run.
            band: returns (x, low, high), for a single run.
        """
        if len(self.runs) == 1:
            return Series(self.label, curve(self.runs[0]), self.css, band or ())
        by_run = [dict(curve(run)) for run in self.runs]
        common = sorted(set.intersection(*(set(points) for points in by_run)))
        means = [(x, Mean.of([points[x] for points in by_run])) for x in common]
        edges = [(x, mean.value - mean.half_width, mean.value + mean.half_width) for x, mean in means]
        return Series(self.label, [(x, mean.value) for x, mean in means], self.css, edges)


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """One group per arm or run without an arm, in the order of their first runs.

    Runs with equal settings and seed, e.g. by different versions, form separate groups.
    """
    members = [(arm.differences, list(arm.runs)) for arm in arms(runs) if len(set(arm.seeds)) == len(arm.seeds)]
    found: list[tuple[str, list[RunData]]] = []
    for run in runs:
        arm = next(((label, group) for label, group in members if run in group), (run.name, [run]))
        if arm not in found:
            found.append(arm)
    return [
        Group(group[0].name if len(group) == 1 else f"{label}, {len(group)} seeds", series_class(index), group)
        for index, (label, group) in enumerate(_named_by_configuration(found))
    ]


def _named_by_configuration(found: list[tuple[str, list[RunData]]]) -> list[tuple[str, list[RunData]]]:
    """The groups, labelled by the name in their configurations if each group has one name and all names differ."""
    names = [{str(run.config.get("name")) for run in group} for _, group in found]
    if any(len(own) > 1 for own in names) or len(set.union(*names)) < len(found):
        return found
    return [(own.pop(), group) for own, (_, group) in zip(names, found, strict=True)]


def colours_of(runs: Sequence[RunData]) -> list[str]:
    """The colour class of each run, which is that of its group."""
    groups = grouped(runs)
    return [next(group.css for group in groups if run in group.runs) for run in runs]
