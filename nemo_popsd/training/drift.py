"""Detects that a run leaves the range of its first steps: responses grow or shrink, thinking stops, or text repeats.

Each quantity has a two-sided CUSUM (E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954; D. C. Montgomery,
"Introduction to Statistical Quality Control", chapter 9). With μ and σ of the first m steps, z = (x − μ) / σ and

    S⁺ ← max(0, S⁺ + z − k)        S⁻ ← max(0, S⁻ − z − k)        alarm if either exceeds h

k is the sum of σ/2 (as usual), σ/√m (the standard error of μ) and the tolerated change: training is meant to change the
model, so a lasting change of a few per cent raises no alarm. The change began after the last step at which the sum was
0. If the standard error of a value is known, as for an accuracy, μ is the first value and σ its standard error.

This module does not need torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_popsd.training.config import DriftConfig

PREFIX = "guard/"
"""Prefix of the metric that records an alarm. `guard/NAME`, logged at the step of the alarm, is the last step before
the change; it is negative if the quantity fell.
"""

_ALLOWANCE = 0.5
"""k in standard deviations: half of the shift that is detected fastest."""
_LEAST_SPREAD = 0.3
"""Minimum standard deviation as a share of the tolerated change, in case the first steps are nearly equal."""


@dataclass(frozen=True)
class Quantity:
    """A monitored quantity."""

    metric: str
    """Name of the metric in metrics.jsonl."""
    meaning: str
    """Description for messages."""
    slack: float
    """Factor that is multiplied with `guard.drift.slack` to obtain the tolerated change."""
    error: str = ""
    """Name of the metric with its standard error; empty if it has none."""
    is_share: bool = False
    """Whether the tolerated change is absolute, as for a share that starts at 0, not relative to the baseline."""

    def tolerated(self, baseline: float, slack: float) -> float:
        """The change that raises no alarm."""
        return self.slack * slack * (1.0 if self.is_share else abs(baseline))


QUANTITIES = {
    "response_tokens": Quantity("train/response_tokens", "the length of a response", 1.0),
    "marker_rate": Quantity("train/marker_rate", "the rate of epistemic markers", 1.0),
    "student_entropy": Quantity("train/student_entropy", "the entropy of the student", 1.0),
    "repetition": Quantity("train/repetition", "the share of repeated text", 1.0, is_share=True),
    "cut_share": Quantity("train/cut_share", "the share of truncated responses", 1.0, is_share=True),
    "forward_kl": Quantity("train/forward_kl", "the distance from the target", 4.0),
    "accuracy": Quantity(
        "validation/accuracy",
        "the accuracy on the validation problems",
        1.0,
        error="validation/accuracy_stderr",
        is_share=True,
    ),
}
"""Quantities by the name of their setting `guard.drift.NAME`."""
METRICS = [name for quantity in QUANTITIES.values() for name in (quantity.metric, quantity.error) if name]
"""Names of the metrics that the detectors read."""


@dataclass(frozen=True)
class Alarm:
    """A quantity left its range."""

    step: int
    """Step of the alarm."""
    name: str
    """Key of `QUANTITIES`."""
    rose: bool
    value: float
    """Value at the step of the alarm."""
    baseline: float
    """Mean of the first steps."""
    onset: int
    """Last step before the change, as estimated from the sums."""

    @property
    def entry(self) -> dict[str, float]:
        """The metric to log; see `PREFIX`."""
        return {PREFIX + self.name: float(self.onset if self.rose else -self.onset)}

    def __str__(self) -> str:
        what = QUANTITIES[self.name]
        verb = "rose" if self.rose else "fell"
        return (
            f"{what.meaning} ({what.metric}) {verb} from {self.baseline:.4g} in the first steps to {self.value:.4g}; "
            f"the change began after step {self.onset}"
        )


@dataclass
class Cusum:
    """The detector of one quantity.

    Args:
        quantity: determines the tolerated change.
        settings: determine m, slack and h.
    """

    quantity: Quantity
    settings: DriftConfig
    _first: list[float] = field(default_factory=list)
    _sums: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    _onset: dict[bool, int] = field(default_factory=dict)
    _error: float = 0.0

    @property
    def suspected(self) -> list[int]:
        """The last step before each change that the sums indicate and that has not raised an alarm yet."""
        return [self._onset[rose] for rose, total in self._sums.items() if total > 0]

    def update(self, step: int, value: float, error: float = 0.0) -> tuple[bool, int, float] | None:
        """Adds the value of a step, and its standard error if known. Non-finite values are ignored.

        Returns:
            Whether the quantity rose, the last step before the change, and the baseline; None without an alarm.
        """
        if not math.isfinite(value):
            return None
        if len(self._first) < (1 if self.quantity.error else self.settings.baseline_steps):
            self._first.append(value)
            self._error = error
            self._onset = {True: step, False: step}
            return None
        count = len(self._first)
        baseline = sum(self._first) / count
        tolerated = self.quantity.tolerated(baseline, self.settings.slack)
        deviation = self._error if self.quantity.error else statistics.stdev(self._first)
        spread = max(deviation, _LEAST_SPREAD * tolerated, 1e-12)
        z, allowance = (value - baseline) / spread, _ALLOWANCE + 1 / math.sqrt(count) + tolerated / spread
        for rose, signed in ((True, z), (False, -z)):
            self._sums[rose] = max(0.0, self._sums[rose] + signed - allowance)
            if self._sums[rose] == 0:
                self._onset[rose] = step
            elif self._sums[rose] > self.settings.threshold:
                return rose, self._onset[rose], baseline
        return None


class DriftWatch:
    """All detectors of a run. A quantity raises at most one alarm."""

    def __init__(self, settings: DriftConfig) -> None:
        """Monitors the quantities whose setting is not `off`."""
        self._detectors = {
            name: Cusum(quantity, settings) for name, quantity in QUANTITIES.items() if settings.action(name) != "off"
        }

    def suspected(self, name: str) -> list[int]:
        """The last step before each change of `name` that may still raise an alarm."""
        return self._detectors[name].suspected if name in self._detectors else []

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Adds the metrics of a step, by their names in metrics.jsonl, and returns new alarms. Metrics may be absent.

        An alarm recorded in `metrics` (see `PREFIX`), as in a resumed run, ends the monitoring of its quantity.
        """
        alarms = []
        for name, detector in list(self._detectors.items()):
            value = metrics.get(QUANTITIES[name].metric)
            error = metrics.get(QUANTITIES[name].error, 0.0)
            found = None if value is None else detector.update(step, value, error)
            if found is not None and value is not None:
                rose, onset, baseline = found
                alarms.append(Alarm(step, name, rose, value, baseline, onset))
            if found is not None or PREFIX + name in metrics:
                del self._detectors[name]
        return alarms
