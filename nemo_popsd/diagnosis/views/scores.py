r"""Scores of a target from measurements of the student's answers, with intervals over problems.

Let y be the answers to a problem, right (r = 1) or wrong (r = 0), U(y) the sum of `lift` over the tokens of y, and D a
distribution, D ∈ {student π_θ, teacher π_T, reference-only teacher π_ref, target P}:

    fork(D)       mean over pairs of a right answer y and a wrong answer y' of D(y_k) / (D(y_k) + D(y'_k)), where k is
                  the first token at which they differ: the probability of the right continuation among the two
    uncertain(D)  mean of favour_D over the uncertain tokens of right answers, minus that of wrong answers
    gain          100 · mean Cov(r, U) / √(mean Var(U)), with means over problems of the covariance and variance within
                  each: the first-order change of the accuracy, in points, for a step along the gradient of the loss
                  that changes the log-probability of an answer by one nat (root mean square)
    markers       1000 · Σ (P(M) − π_θ(M)) / tokens, where M are the entries that equal a marker
    length        Σ π_θ(E) / Σ P(E) − 1, where E are the entries that end an answer: the relative change of tokens
                  per end if the probability of an end at each state were that of the target

Intervals are percentiles of a bootstrap over problems (`nemo_popsd.evaluation.estimates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_popsd.diagnosis.views.record import Score
from nemo_popsd.evaluation.estimates import Ratio, interval, resampled

Array = NDArray[np.float64]

SUMS = (
    "tokens",
    "norm_ratio",
    "cosine_question",
    "cosine_reference",
    "defined_norm_ratio",
    "defined_cosine_question",
    "defined_cosine_reference",
    "distance",
    "uncertain",
    "favour_student",
    "favour_teacher",
    "favour_reference_only",
    "favour_target",
    "lift",
    "markers_student",
    "markers_target",
    "ends_student",
    "ends_target",
)
"""Names of the sums over the tokens of one answer; favours are summed over its uncertain tokens."""
_DISTRIBUTIONS = ("student", "teacher", "reference_only", "target")
_DIFFERENCES = {"teacher_over_reference": ("teacher", "reference_only"), "target_over_student": ("target", "student")}


@dataclass(frozen=True)
class AnswerFigures:
    """The measurements of one answer of the student under one target."""

    problem: int
    """Index of its problem."""
    tokens: Sequence[int]
    """The measured tokens."""
    sums: Array
    """Sums [len(SUMS)] in the order of `SUMS`."""
    probability: NDArray[np.floating]
    """Probability of each token under student, teacher, reference-only teacher and target [4, tokens]."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Settings of the bootstrap intervals."""

    resamples: int
    confidence: float
    seed: int


class _Statistic:
    """A function of two means over problems; a quotient of means is that of sums."""

    def __init__(
        self,
        numerators: Sequence[float] | Array,
        denominators: Sequence[float] | Array,
        of: Callable[[Array, Array], Array] = lambda a, b: a / b,
    ) -> None:
        self.numerators, self.denominators, self._of = np.asarray(numerators), np.asarray(denominators), of

    def score(self, how: Resampling) -> Score | None:
        """Value and interval; None if the denominators sum to 0."""
        if not self.denominators.sum() > 0:
            return None
        value = float(self._of(self.numerators.mean(), self.denominators.mean()))
        low, high = interval(self.resampled(how), how.confidence)
        return {"value": value, "low": low, "high": high}

    def resampled(self, how: Resampling) -> Array:
        """Values [R]; resamples with a denominator of 0 are omitted."""
        ones = [1.0] * len(self.numerators)
        parts = resampled(
            [Ratio(self.numerators.tolist(), ones), Ratio(self.denominators.tolist(), ones)],
            resamples=how.resamples,
            seed=how.seed,
        )
        parts = parts[parts[:, 1] > 0]
        return self._of(parts[:, 0], parts[:, 1])


def score_target(
    figures: Sequence[AnswerFigures],
    right: Sequence[bool],
    teacher_right: Mapping[int, Sequence[bool]],
    problems: int,
    how: Resampling,
) -> dict[str, Score | None]:
    """All scores of one target by name; None for scores that are undefined on all problems.

    Args:
        figures: measurements of all answers of the student.
        right: whether each of these answers is right.
        teacher_right: whether each answer of the teacher is right, by index of the problem.
        problems: number of problems.
        how: settings of the intervals.
    """
    statistics = _of_tokens(figures, problems) | _of_continuations(figures, right, problems)
    base = [_mean([float(r) for f, r in zip(figures, right, strict=True) if f.problem == p]) for p in range(problems)]
    taught = [_mean([float(r) for r in teacher_right[p]]) for p in range(problems)]
    ones = [1.0] * problems
    statistics["accuracy"] = _Statistic(taught, ones)
    statistics["accuracy_over_student"] = _Statistic([t - b for t, b in zip(taught, base, strict=True)], ones)
    statistics["gain"] = gain(figures, right, problems)
    return {name: statistic.score(how) for name, statistic in statistics.items()}


def score_student(
    figures: Sequence[AnswerFigures], right: Sequence[bool], problems: int, how: Resampling
) -> dict[str, Score | None]:
    """The student's scores, as a baseline: accuracy, markers and ends per 1,000 tokens."""
    sums = _by_problem(figures, problems)
    shares = [_mean([float(r) for f, r in zip(figures, right, strict=True) if f.problem == p]) for p in range(problems)]
    statistics = {
        "accuracy": _Statistic(shares, [1.0] * problems),
        "markers": _Statistic(1000 * sums["markers_student"], sums["tokens"]),
        "ends": _Statistic(1000 * sums["ends_student"], sums["tokens"]),
    }
    return {name: statistic.score(how) for name, statistic in statistics.items()}


def gain(figures: Sequence[AnswerFigures], right: Sequence[bool], problems: int) -> _Statistic:
    """The statistic `gain`; the resamples of two targets are paired."""
    covariance, variance = np.zeros(problems), np.zeros(problems)
    column = SUMS.index("lift")
    for problem in range(problems):
        pairs = [(float(r), f.sums[column]) for f, r in zip(figures, right, strict=True) if f.problem == problem]
        if len(pairs) > 1:
            covariance[problem], variance[problem] = (
                np.cov(np.array(pairs).T)[0, 1],
                np.var([u for _, u in pairs], ddof=1),
            )
    return _Statistic(covariance, variance, lambda c, v: 100 * c / np.sqrt(v))


def gain_over(one: _Statistic, other: _Statistic, how: Resampling) -> Score | None:
    """The paired difference of two gains; None if one is undefined."""
    first, second = one.score(how), other.score(how)
    if first is None or second is None:
        return None
    values, others = one.resampled(how), other.resampled(how)
    if len(values) != len(others):
        return None
    low, high = interval(values - others, how.confidence)
    return {"value": first["value"] - second["value"], "low": low, "high": high}


def problems_with_both(problems: Sequence[int], right: Sequence[bool]) -> set[int]:
    """The problems that have right and wrong answers."""
    rights = {p for p, r in zip(problems, right, strict=True) if r}
    return rights & {p for p, r in zip(problems, right, strict=True) if not r}


def problems_needed(right: Sequence[bool], samples: int, wanted: int) -> int:
    """Estimates how many problems are needed to obtain `wanted` problems with both right and wrong answers.

    Assumes the accuracy of `right` for all problems. If all or no answers are right, the bound of the rule of three,
    3 / number of answers, replaces it.
    """
    share = sum(right) / len(right)
    if share in (0, 1):
        share = min(3 / len(right), 0.5)
    both = 1 - share**samples - (1 - share) ** samples
    return math.ceil(wanted / both)


def _of_tokens(figures: Sequence[AnswerFigures], problems: int) -> dict[str, _Statistic]:
    """Statistics of all tokens."""
    sums = _by_problem(figures, problems)
    found = {
        name: _Statistic(sums[name], sums[f"defined_{name}"])
        for name in ("norm_ratio", "cosine_question", "cosine_reference")
    }
    found["distance"] = _Statistic(sums["distance"], sums["tokens"])
    found["markers"] = _Statistic(1000 * (sums["markers_target"] - sums["markers_student"]), sums["tokens"])
    found["markers_share"] = _Statistic(sums["markers_target"], sums["markers_student"], lambda q, p: q / p - 1)
    found["ends"] = _Statistic(1000 * (sums["ends_target"] - sums["ends_student"]), sums["tokens"])
    found["length_share"] = _Statistic(sums["ends_student"], sums["ends_target"], lambda p, q: p / q - 1)
    return found


def _of_continuations(figures: Sequence[AnswerFigures], right: Sequence[bool], problems: int) -> dict[str, _Statistic]:
    """`fork_D`, `uncertain_D` and their differences."""
    forks, uncertain = np.full((problems, 4), np.nan), np.full((problems, 4), np.nan)
    for problem in range(problems):
        sides: list[list[AnswerFigures]] = [[], []]
        for figure, is_right in zip(figures, right, strict=True):
            if figure.problem == problem:
                sides[is_right].append(figure)
        wrong, correct = sides
        shares = [share for one in correct for other in wrong if (share := _fork(one, other)) is not None]
        if shares:
            forks[problem] = np.mean(shares, axis=0)
        favours = [_favour(side) for side in (correct, wrong)]
        if favours[0] is not None and favours[1] is not None:
            uncertain[problem] = favours[0] - favours[1]
    found: dict[str, _Statistic] = {}
    for kind, values in (("fork", forks), ("uncertain", uncertain)):
        known = np.isfinite(values[:, 0]).astype(np.float64)
        filled = np.nan_to_num(values)
        columns = dict(zip(_DISTRIBUTIONS, filled.T, strict=True))
        found |= {f"{kind}_{name}": _Statistic(column, known) for name, column in columns.items()}
        found |= {f"{kind}_{n}": _Statistic(columns[a] - columns[b], known) for n, (a, b) in _DIFFERENCES.items()}
    return found


def _fork(one: AnswerFigures, other: AnswerFigures) -> Array | None:
    """D(y_k) / (D(y_k) + D(y'_k)) [4]; 0.5 if both have probability 0; None if one answer starts with the other."""
    place = next((k for k, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    if place is None:
        return None
    mine, theirs = one.probability[:, place].astype(np.float64), other.probability[:, place].astype(np.float64)
    total = mine + theirs
    return np.where(total > 0, mine / np.where(total > 0, total, 1.0), 0.5)


def _favour(side: Sequence[AnswerFigures]) -> Array | None:
    """Mean favour over the uncertain tokens of some answers [4]; None if there are no such tokens."""
    if not side:
        return None
    sums = np.sum([figure.sums for figure in side], axis=0)
    count, first = sums[SUMS.index("uncertain")], SUMS.index("favour_student")
    return sums[first : first + 4] / count if count else None


def _by_problem(figures: Sequence[AnswerFigures], problems: int) -> dict[str, Array]:
    """Sums over the answers to each problem, [problems] each, by name."""
    sums = np.zeros((problems, len(SUMS)))
    for figure in figures:
        sums[figure.problem] += figure.sums
    return dict(zip(SUMS, sums.T, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
