"""Means over seeds, their intervals, and tests corrected for multiple comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t
from scipy.stats import ttest_1samp


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float
    """Half width of the 95 % interval (Student's t); NaN for one seed."""
    p: float
    """Two-sided p-value of the t-test against 0; NaN for one seed or equal values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Student's t over the seeds."""
        count = len(values)
        if count < 2:
            return cls(statistics.fmean(values), math.nan, math.nan)
        error = statistics.stdev(values) / math.sqrt(count)
        half_width = float(student_t.ppf(0.975, count - 1)) * error
        return cls(statistics.fmean(values), half_width, float(ttest_1samp(values, 0).pvalue) if error else math.nan)

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Text for a table."""
        return f"{self.mean:{'+' if sign else ''}.{digits}f} ± {self.half_width:.{digits}f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979), in the same order.

    NaN stands for a test that was not made; it is kept and not counted.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted


def p_text(p: float) -> str:
    """Text of a p-value for a table."""
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
