"""Positions of the response in each context.

The same response ids follow each prompt unchanged. Prompts differ in length, so the positions differ by context. Only
this module implements the shift by one between a token and the position that predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence


def append_response(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
    """Ids of a sequence: the prompt, then the response exactly as it was generated (not decoded and re-encoded)."""
    if not len(prompt_ids):
        raise ValueError("empty prompt: no position predicts the first response token")
    return [*prompt_ids, *response_ids]


def response_positions(prompt_length: int, response_length: int) -> slice:
    """Positions of the sequence whose hidden state predicts each response token, in response order.

    With prompt length P and response length R, the sequence has P + R positions, counted from 0. Response token i has
    position P + i and is predicted at P + i - 1, so the slice is [P - 1, P + R - 1): R positions, starting at the last
    prompt position. The state at the last response token predicts no token of the response. An empty response gives an
    empty slice; a truncated response is aligned like any other.

    Args:
        prompt_length: tokens of this context's prompt, at least 1.
        response_length: tokens of the response, at least 0.
    """
    if prompt_length < 1 or response_length < 0:
        raise ValueError(f"got prompt_length={prompt_length}, response_length={response_length}; need >= 1 and >= 0")
    return slice(prompt_length - 1, prompt_length - 1 + response_length)
