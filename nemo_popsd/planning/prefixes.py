"""Tokens of the frozen passes of one question, each sequence separately or each distinct prefix once.

As `nemo_popsd.megatron.prefix` computes them, from lengths alone: responses have nothing in common, and template texts
are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FrozenWork:
    """Of one question, its responses included."""

    tokens: int = 0
    """Tokens that go through the layers."""
    squares: int = 0
    """Sum of the squares of the lengths of their pieces, each of which attends to itself causally."""
    earlier: int = 0
    """Sum over pieces of their tokens times the earlier positions that all of these attend to."""
    longest: int = 0
    """Tokens of the longest piece."""
    kept: int = 0
    """Positions that a piece continues, at most."""

    @classmethod
    def separate(cls, lengths: Sequence[int], responses: int) -> FrozenWork:
        """Each sequence on its own.

        Args:
            lengths: of one sequence of each branch.
            responses: to the question.
        """
        tokens, squares = sum(lengths), sum(length**2 for length in lengths)
        return cls(responses * tokens, responses * squares, longest=max(lengths, default=0))

    @classmethod
    def shared(cls, contexts: Sequence[Sequence[tuple[str, int]]], response: int, responses: int) -> FrozenWork:
        """Each distinct prefix once.

        Args:
            contexts: of the branches, as named parts with their lengths; equal names are equal tokens.
            response: tokens of a response.
            responses: to the question.
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
