"""Statistics over several responses to one question: whether one is right, and how much they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.training.trajectory import Trajectory

_NGRAM = 4


@dataclass
class SiblingSums:
    """Sums over the questions of a step on one rank, from which means over all ranks are computed."""

    questions: int = 0
    """Number of questions with a finished response."""
    distinct: float = 0.0
    """Sum over questions of the share of distinct n-grams."""
    graded_questions: int = 0
    """Number of questions with a known answer."""
    solved: int = 0
    """Number of these with at least one right response."""


def sibling_sums(trajectories: Sequence[Trajectory]) -> SiblingSums:
    """The sums over the questions of `trajectories`.

    Those of a question must be complete, except for responses that a token budget left unfinished.
    """
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.row_id, []).append(trajectory)
    sums = SiblingSums()
    for group in groups.values():
        sums.questions += 1
        sums.distinct += distinct_share([t.rollout.response for t in group])
        if any(t.right is not None for t in group):
            sums.graded_questions += 1
            sums.solved += any(t.right for t in group)
    return sums


def distinct_share(responses: Sequence[Sequence[int]]) -> float:
    """Share of distinct token 4-grams among all 4-grams of `responses`; a shorter response counts as one 4-gram."""
    ngrams = [
        tuple(response[begin : begin + _NGRAM])
        for response in responses
        for begin in range(max(1, len(response) - _NGRAM + 1))
    ]
    return len(set(ngrams)) / len(ngrams)
