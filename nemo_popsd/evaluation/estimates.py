"""pass@k, majority@k, and bootstrap intervals. Arrays: P problems, R resamples.

Problems are the unit of resampling: responses to one problem are correlated, and the interval is for a new set of
problems. Two evaluations of the same problems are resampled together (paired), so that the difficulty of the problems
cancels in the difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """A statistic Σ numerators / Σ denominators over problems; the denominators of a mean over problems are 1."""

    numerators: Sequence[float]
    denominators: Sequence[float]

    @property
    def value(self) -> float:
        """The statistic; 0 if the denominators sum to 0."""
        total = math.fsum(self.denominators)
        return math.fsum(self.numerators) / total if total else 0.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is correct: 1 − C(n−c, k) / C(n, k).

    See Chen et al. 2021.

    Args:
        samples: number of responses n.
        correct: number of correct responses c.
        k: number of selected responses, at most n.
    """
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(votes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is correct: 1 or 0, or a value in between for a tie.

    Responses without an answer do not vote. Tied answers are equally likely to be selected, so the value is the share
    of correct answers among them. Without any vote it is 0.

    Args:
        votes: votes of the responses to one problem; equal answers have the same number, None means no answer.
        correct: whether each answer is correct.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    right = {vote for vote, is_right in zip(votes, correct, strict=True) if is_right}
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return sum(vote in right for vote in winners) / len(winners)


def resampled(figures: Sequence[Ratio], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Each statistic for each resample of the problems [R, statistics]. The same seed selects the same problems.

    Args:
        figures: statistics over the same P problems, in the same order.
        resamples: number of resamples R; memory use is that of [R, P] doubles.
        seed: seed of the resampling.
    """
    numerators = np.array([figure.numerators for figure in figures], dtype=np.float64)
    denominators = np.array([figure.denominators for figure in figures], dtype=np.float64)
    problems = numerators.shape[1]
    counts = np.random.default_rng(seed).multinomial(problems, [1.0 / problems] * problems, size=resamples)
    total = counts.astype(np.float64) @ denominators.T
    return np.divide(counts @ numerators.T, total, out=np.zeros_like(total), where=total != 0)


def interval(values: NDArray[np.float64], confidence: float) -> Interval:
    """The percentile interval that contains the share `confidence` of `values` [R]."""
    low, high = np.percentile(values, [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)])
    return float(low), float(high)


def intervals(figures: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int) -> dict[str, Interval]:
    """The interval of each statistic, all from the same resamples."""
    values = resampled(list(figures.values()), resamples=resamples, seed=seed)
    return {name: interval(values[:, column], confidence) for column, name in enumerate(figures)}


def changes(
    before: Mapping[str, Ratio], after: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """The paired interval of after − before for each common statistic, over the same problems."""
    names = [name for name in before if name in after]
    old, new = (resampled([side[name] for name in names], resamples=resamples, seed=seed) for side in (before, after))
    return {name: interval(new[:, column] - old[:, column], confidence) for column, name in enumerate(names)}
