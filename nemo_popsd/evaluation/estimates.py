"""pass@k, majority@k, and bootstrap intervals. Arrays: P problems, R resamples.

Problems are the unit of resampling: responses to one problem resemble each other, and a fresh set of problems is what
the interval speaks about. Two evaluations of the same problems are resampled together (paired), so what is hard for
both cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def majority_is_correct(
    answers: Sequence[str | None], correct: Sequence[bool], same: Callable[[str, str], bool]
) -> float:
    """Whether the answer that most responses gave is correct: 1 or 0, or in between on a tie.

    Responses without an answer do not vote. Among answers that tie each is as likely to be taken, so the value is the
    share of correct ones. No votes at all give 0.

    Args:
        answers: of the responses to one problem.
        correct: whether each is the expected one.
        same: whether two answers are the same one.
    """
    groups: list[tuple[str, bool, list[int]]] = []
    for number, (answer, right) in enumerate(zip(answers, correct, strict=True)):
        if answer is None:
            continue
        for representative, group_right, members in groups:
            if group_right == right and (right or same(answer, representative)):
                members.append(number)
                break
        else:
            groups.append((answer, right, [number]))
    if not groups:
        return 0.0
    most = max(len(members) for _, _, members in groups)
    winners = [right for _, right, members in groups if len(members) == most]
    return sum(winners) / len(winners)


def bootstrap(figures: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int) -> dict[str, Interval]:
    """Percentile interval of each figure, all from the same resamples of the problems.

    Args:
        figures: over the same P problems, in the same order.
        resamples: R; memory is that of [R, P] doubles.
        confidence: 0.95 for 95 % intervals.
        seed: of the resampling.
    """
    if not figures:
        return {}
    below, above = _tails(confidence)
    values = _resampled(list(figures.values()), resamples, seed)
    return {name: _interval(values[:, place], below, above) for place, name in enumerate(figures)}


def bootstrap_changes(
    before: Mapping[str, Ratio], after: Mapping[str, Ratio], *, resamples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """Percentile interval of after − before for the figures that both have, on the same resampled problems."""
    names = [name for name in before if name in after]
    if not names:
        return {}
    below, above = _tails(confidence)
    values = [_resampled([side[name] for name in names], resamples, seed) for side in (before, after)]
    return {name: _interval(values[1][:, i] - values[0][:, i], below, above) for i, name in enumerate(names)}


def _resampled(figures: Sequence[Ratio], resamples: int, seed: int) -> NDArray[np.float64]:
    """[R, figures]: each figure on each resample; how often a problem is drawn is multinomial."""
    over = np.array([figure.numerators for figure in figures], dtype=np.float64)
    under = np.array([figure.denominators for figure in figures], dtype=np.float64)
    problems = over.shape[1]
    times = np.random.default_rng(seed).multinomial(problems, [1.0 / problems] * problems, size=resamples)
    total = times.astype(np.float64) @ under.T
    return np.divide(times @ over.T, total, out=np.zeros_like(total), where=total != 0)


def _tails(confidence: float) -> tuple[float, float]:
    return 50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)


def _interval(values: NDArray[np.float64], below: float, above: float) -> Interval:
    low, high = np.percentile(values, [below, above])
    return float(low), float(high)
