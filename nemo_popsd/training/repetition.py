"""Repetition within a response. Does not need torch."""

from __future__ import annotations

from collections.abc import Sequence

SPAN = 8
"""Length of a repeated passage in tokens."""


def repeated_tokens(response: Sequence[int], span: int = SPAN) -> int:
    """Number of tokens that complete a passage of `span` tokens that occurred earlier in the response.

    A loop counts in full from its second iteration on; a formula that occurs twice counts if it has at least `span`
    tokens.
    """
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for end in range(span, len(response) + 1):
        passage = tuple(response[end - span : end])
        repeated += passage in seen
        seen.add(passage)
    return repeated
