"""Synthetic scores of responses, and the settings with which they were generated."""

from __future__ import annotations

from typing import Any

from nemo_popsd.evaluation.records import SampleScore, SampleSettings


def score(problem: str, correct: bool = True, *, sample: int = 0, waits: int = 0, **fields: Any) -> SampleScore:
    """A score of 100 tokens with one "Check" and `waits` times "Wait"; correct answers share a vote."""
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


def sample_settings(prompts: dict[str, str], **fields: Any) -> SampleSettings:
    """Settings of samples; `prompts` has the digest of the prompt by problem."""
    defaults: dict[str, Any] = {
        "model": "m",
        "weights_digest": "f",
        "engine": "e",
        "seed": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_response_tokens": 8,
        "stop_token_ids": (2, 3),
    }
    return SampleSettings(prompts=prompts, **{**defaults, **fields})
