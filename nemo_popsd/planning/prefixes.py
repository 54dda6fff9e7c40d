"""Tokens of the frozen passes for one question, with separate sequences or with each distinct prefix once.

Computed from lengths alone for what `nemo_popsd.megatron.prefix` does: responses are assumed to share no tokens, and
template texts are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FrozenWork:
    """Work of the frozen passes for one question and its responses."""

    tokens: int = 0
    """Tokens that pass the layers."""
    squares: int = 0
    """Sum of the squared lengths of the pieces, each of which attends to itself causally."""
    earlier: int = 0
    """Sum over pieces of the number of tokens times the number of earlier positions to which they attend."""
    longest: int = 0
    """Tokens of the longest piece."""
    kept: int = 0
    """Maximum number of positions that precede a piece."""

    @classmethod
    def separate(cls, lengths: Sequence[int], responses: int) -> FrozenWork:
        """The work with each sequence computed separately.

        Args:
            lengths: length of one sequence per branch.
            responses: number of responses to the question.
        """
        tokens, squares = sum(lengths), sum(length**2 for length in lengths)
        return cls(responses * tokens, responses * squares, longest=max(lengths, default=0))

    @classmethod
    def shared(cls, contexts: Sequence[Sequence[tuple[str, int]]], response: int, responses: int) -> FrozenWork:
        """The work with each distinct prefix computed once.

        Args:
            contexts: context of each branch as named parts with their lengths; equal names mean equal tokens.
            response: tokens of a response.
            responses: number of responses to the question.
        """
        pieces: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for context in contexts:
            path: tuple[str, ...] = ()
            begin = 0
            for name, length in context:
                path = (*path, name)
                pieces[path] = (1, begin, length)
                begin += length
            pieces[*path, "responses"] = (responses, begin, response)
        return cls(
            tokens=sum(count * length for count, _, length in pieces.values()),
            squares=sum(count * length**2 for count, _, length in pieces.values()),
            earlier=sum(count * length * begin for count, begin, length in pieces.values()),
            longest=max((length for _, _, length in pieces.values()), default=0),
            kept=max((begin for _, begin, _ in pieces.values()), default=0),
        )
