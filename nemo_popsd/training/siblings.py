"""Several responses to one question: whether one of them is right, and how much they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.training.trajectory import Trajectory

_NGRAM = 4


@dataclass
class SiblingSums:
    """Sums over the questions of a step on one rank, for means over all ranks."""

    questions: int = 0
    """Questions with a finished response."""
    distinct: float = 0.0
    """Sum over questions of the share of distinct n-grams."""
    graded_questions: int = 0
    """Questions whose answer is known."""
    solved: int = 0
    """Those with at least one right response."""


def sibling_sums(trajectories: Sequence[Trajectory]) -> SiblingSums:
    """The sums over the questions of `trajectories`: all that belong to a question, or what of them a token budget let
    end.
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
    """Share of distinct 4-grams of tokens among all of `responses`; a shorter response counts as one."""
    ngrams = [
        tuple(response[begin : begin + _NGRAM])
        for response in responses
        for begin in range(max(1, len(response) - _NGRAM + 1))
    ]
    return len(set(ngrams)) / len(ngrams)
