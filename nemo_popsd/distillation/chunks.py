"""How many tokens a chunk has: memory against the cost of small products."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # sizes are planned where there is no torch
    from torch import Tensor

LARGEST_CHUNK = 1024
"""Tokens. Every chunk reads and writes all of dW once: with fewer tokens that outweighs its product."""

_ROW_TOKENS = 8192
_SHARE_OF_A_ROW = 0.4
_MULTIPLE = 64


def default_chunk_tokens(buffers: float) -> int:
    """Tokens of a chunk whose `buffers` [C, V] buffers in fp32 take at most 0.4 of an fp32 [8192, V] tensor.

    That leaves the other half of 0.8 for what grows with [N, H] and for dW where no trainer keeps it. The result does
    not depend on V: the memory of a chunk and that of everything else are proportional to it alike.
    """
    affordable = int(_SHARE_OF_A_ROW * _ROW_TOKENS / buffers)
    return min(LARGEST_CHUNK, affordable // _MULTIPLE * _MULTIPLE)


def chunk_slices(tokens: int, chunk_tokens: int) -> list[slice]:
    """All tokens in chunks of at most `chunk_tokens`."""
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def sampled_slices(index: Tensor, chunks: list[slice]) -> list[slice]:
    """Which entries of an ascending index fall into each chunk. Waits for the device once."""
    entries = index.tolist()
    stops = [0, *(bisect_left(entries, chunk.stop) for chunk in chunks)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]
