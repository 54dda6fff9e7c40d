"""Arms (runs that differ only in their seed), and means over their seeds with 95 % intervals (Student's t)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.report.markup import esc, fixed, signed, table
from nemo_popsd.report.run import NOT_OF_AN_ARM, RunData, flat_settings

_FIGURES = (
    ("accuracy", "accuracy, %", 100.0),
    ("markers_per_1000_tokens", "markers per 1,000 tokens", 1.0),
    ("mean_tokens", "tokens per answer", 1.0),
)
# Quantile 0.975 of Student's t for 1 to 30 degrees of freedom; beyond, `_quantile` expands it in 1/df.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    half_width: float
    """Half width of the 95 % interval; NaN for one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean over the seeds, with the interval by Student's t."""
        count = len(values)
        if count < 2:
            return cls(values[0], math.nan)
        error = statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.fmean(values), _quantile(count - 1) * error)

    def text(self, *, sign: bool = False) -> str:
        """The mean, followed by the half width if there are several seeds."""
        value = signed(self.value) if sign else fixed(self.value)
        return value if math.isnan(self.half_width) else f"{value} ± {fixed(self.half_width)}"


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed, by ascending seed."""

    runs: Sequence[RunData]
    differences: str
    """The settings in which the arm differs from other arms; the name of its first run if there are none."""

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [int(run.config["seed"]) for run in self.runs]  # type: ignore[call-overload]

    def figures(self, name: str, scale: float) -> tuple[Mean, Mean, Mean] | None:
        """A statistic before and after training, and its change; None if a run lacks it."""
        ends = [(run.before, run.after) for run in self.runs]
        pairs = [(b.values.get(name), a.values.get(name)) for b, a in ends if b is not None and a is not None]
        known = [(scale * b, scale * a) for b, a in pairs if b is not None and a is not None]
        if len(known) < len(self.runs):
            return None
        before, after = zip(*known, strict=True)
        return Mean.of(before), Mean.of(after), Mean.of([a - b for b, a in known])


def arms(runs: Sequence[RunData]) -> list[Arm]:
    """The arms among `runs`, in the order of their first runs. Runs without a seed belong to no arm."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if isinstance(run.config.get("seed"), int):
            groups.setdefault(json.dumps(_settings(run), sort_keys=True, default=str), []).append(run)
    flat = [flat_settings(_settings(group[0])) for group in groups.values()]
    names = {name for settings in flat for name in settings}
    differing = sorted(name for name in names if len({str(settings.get(name)) for settings in flat}) > 1)
    return [
        Arm(
            sorted(group, key=lambda run: int(run.config["seed"])),  # type: ignore[call-overload]
            ", ".join(f"{name}={settings.get(name)}" for name in differing) or group[0].name,
        )
        for group, settings in zip(groups.values(), flat, strict=True)
    ]


def over_seeds(runs: Sequence[RunData]) -> list[list[str]]:
    """The table of arms: a heading, then a line for each arm; empty if no arm has several seeds."""
    found = arms(runs)
    if not any(len(arm.runs) > 1 for arm in found):
        return []
    heading = ["", "seeds"]
    for _, title, _ in _FIGURES:
        heading += [f"{title}: before", "after", "change"]
    lines = []
    for arm in found:
        line = [arm.differences, ", ".join(map(str, arm.seeds))]
        for name, _, scale in _FIGURES:
            means = arm.figures(name, scale)
            line += ["–"] * 3 if means is None else [means[0].text(), means[1].text(), means[2].text(sign=True)]
        lines.append(line)
    return [heading, *lines]


def section(runs: Sequence[RunData]) -> str:
    """The table as HTML; "" if no arm has several seeds."""
    lines = over_seeds(runs)
    if not lines:
        return ""
    heading, *rest = ([esc(cell) for cell in line] for line in lines)
    return f'<p class="note">{_NOTE}</p>{table(heading, rest)}'


def text(runs: Sequence[RunData]) -> str:
    """The table as text for the terminal, one block per arm; "" if no arm has several seeds."""
    lines = over_seeds(runs)
    if not lines:
        return ""
    blocks = []
    for arm, seeds, *cells in lines[1:]:
        rows = [f"{arm} (seeds {seeds})"]
        for index, (_, title, _) in enumerate(_FIGURES):
            before, after, change = cells[3 * index : 3 * index + 3]
            rows.append(f"  {title:26}{before:>16} -> {after:>16}   change {change}")
        blocks.append("\n".join(rows))
    return "\n".join([*blocks, _NOTE])


_NOTE = "means over the seeds of runs with otherwise equal settings, ± half widths of 95 % intervals (Student’s t)"


def _quantile(degrees: int) -> float:
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.37 / degrees + 2.8 / degrees**2


def _settings(run: RunData) -> dict[str, object]:
    return {key: value for key, value in run.config.items() if key not in NOT_OF_AN_ARM}
