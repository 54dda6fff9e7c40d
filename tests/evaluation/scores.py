"""Synthetic scores of responses."""

from __future__ import annotations

from typing import Any

from nemo_popsd.evaluation.records import SampleScore


def score(problem: str, correct: bool = True, *, sample: int = 0, waits: int = 0, **fields: Any) -> SampleScore:
    """A score of 100 tokens with one "Check", and `waits` of "Wait"; correct answers share a vote."""
    defaults: dict[str, Any] = {
        "answer": "1" if correct else "2",
        "decided_by": "exact",
        "vote": 0 if correct else 1,
        "truncated": False,
        "tokens": 100,
        "markers": {"Wait": waits, "Check": 1},
        "segments": 1,
        "closed_thinking": True,
        "repeated": 0.0,
        "looping": False,
    }
    return SampleScore(problem=problem, sample=sample, correct=correct, **{**defaults, **fields})
