"""pass@k, majority@k, and bootstrap intervals. Arrays: P problems, R resamples.

Problems are the unit of resampling: responses to one problem resemble each other, and a fresh set of problems is what
the interval speaks about. Two evaluations of the same problems are resampled together (paired), so what is hard for
both cancels in the difference.
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
    """A figure Σ numerators / Σ denominators over problems; a mean over problems has ones below."""

    numerators: Sequence[float]
    denominators: Sequence[float]

    @property
    def value(self) -> float:
        """The figure; 0 where the denominators sum to 0."""
        below = math.fsum(self.denominators)
        return math.fsum(self.numerators) / below if below else 0.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses is correct: 1 − C(n−c, k) / C(n, k) (Chen et al. 2021).

    Args:
        samples: n responses drawn.
        correct: c of them correct.
        k: at most n.
    """
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(votes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Whether the answer that most responses gave is correct: 1 or 0, or in between on a tie.

    Responses without an answer do not vote. Among answers that tie each is as likely to be taken, so the value is the
    share of correct ones. No votes at all give 0.

    Args:
        votes: of the responses to one problem; the same number for the same answer, None for no answer.
        correct: whether each is the expected one.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    right = {vote for vote, is_right in zip(votes, correct, strict=True) if is_right}
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return sum(vote in right for vote in winners) / len(winners)


def resampled(figures: Sequence[Ratio], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Each figure on each resample of the problems, [R, figures]; the same seed draws the same problems.

    Args:
        figures: over the same P problems, in the same order.
        resamples: R; memory is that of [R, P] doubles.
        seed: of the resampling.
    """
    over = np.array([figure.numerators for figure in figures], dtype=np.float64)
    under = np.array([figure.denominators for figure in figures], dtype=np.float64)
    problems = over.shape[1]
    times = np.random.default_rng(seed).multinomial(problems, [1.0 / problems] * problems, size=resamples)
    total = times.astype(np.float64) @ under.T
    return np.divide(times @ over.T, total, out=np.zeros_like(total), where=total != 0)


def interval(values: NDArray[np.float64], confidence: float) -> Interval:
    """Percentile interval that holds a share `confidence` of `values` [R]."""
    low, high = np.percentile(values, [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)])
    return float(low), float(high)


def intervals(figures: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int) -> dict[str, Interval]:
    """The interval of each figure, all from the same resamples."""
    values = resampled(list(figures.values()), resamples=resamples, seed=seed)
    return {name: interval(values[:, place], confidence) for place, name in enumerate(figures)}


def changes(
    before: Mapping[str, Ratio], after: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """The interval of after − before for each figure that both have, over the same problems: paired."""
    names = [name for name in before if name in after]
    old, new = (resampled([side[name] for name in names], resamples=resamples, seed=seed) for side in (before, after))
    return {name: interval(new[:, place] - old[:, place], confidence) for place, name in enumerate(names)}
