"""Measures how much of a response repeats itself. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

SPAN = 8
"""Tokens of a repeated passage."""


def repeated_tokens(response: Sequence[int], span: int = SPAN) -> int:
    """Number of tokens that complete a passage of `span` tokens which the response had before.

    A loop counts in full from its second round on; a formula that is written twice counts once it has `span` tokens.
    """
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for end in range(span, len(response) + 1):
        passage = tuple(response[end - span : end])
        repeated += passage in seen
        seen.add(passage)
    return repeated
