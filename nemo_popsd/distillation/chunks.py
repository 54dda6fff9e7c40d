"""The number of tokens of a chunk: few need less memory, many make products efficient."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the planner imports this module without torch
    from torch import Tensor

LARGEST_CHUNK = 1024
"""Most tokens of a default chunk. Each chunk reads and writes dW once; at this size its product takes longer."""

_LOGITS_TOKENS = 8192
_SHARE_OF_LOGITS = 0.4
_MULTIPLE = 64


def default_chunk_tokens(buffers: float) -> int:
    """Tokens of a chunk whose `buffers` [C, V] buffers in fp32 take at most 0.4 of an fp32 [8192, V] tensor.

    The limit of the complete loss is 0.8 of that tensor (`distillation.chunk_tokens`); the other half is for tensors of
    [N, H], and for dW where no trainer keeps it. The result does not depend on V, since the memory of a chunk and the
    limit are both proportional to V.
    """
    affordable = int(_SHARE_OF_LOGITS * _LOGITS_TOKENS / buffers)
    return min(LARGEST_CHUNK, affordable // _MULTIPLE * _MULTIPLE)


def chunk_slices(tokens: int, chunk_tokens: int) -> list[slice]:
    """All tokens in chunks of at most `chunk_tokens`."""
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def sampled_slices(index: Tensor, chunks: list[slice]) -> list[slice]:
    """Which entries of an ascending index fall into each chunk. Waits for the device once."""
    entries = index.tolist()
    stops = [0, *(bisect_left(entries, chunk.stop) for chunk in chunks)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]
