"""A chunk, the tokens that the loss computes together: its size, the inputs of its loss, and the result.

Smaller chunks need less memory; larger chunks make the matrix products more efficient.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the planner imports this module without torch
    from torch import Tensor

LARGEST_CHUNK = 1024
"""Upper bound of the default chunk size in tokens. Each chunk reads and writes dW once; at this size the matrix product
takes longer than that.
"""

_LOGITS_TOKENS = 8192
_SHARE_OF_LOGITS = 0.4
_MULTIPLE = 64


def default_chunk_tokens(buffers: float) -> int:
    """Number of tokens of a chunk whose `buffers` fp32 [C, V] buffers take at most 0.4 of an fp32 [8192, V] tensor.

    The limit of the complete loss is 0.8 of that tensor (`distillation.chunk_tokens`); the other half is for tensors of
    [N, H], and for dW if no trainer holds it. The result does not depend on V, since the memory of a chunk and the
    limit are both proportional to V.
    """
    affordable = int(_SHARE_OF_LOGITS * _LOGITS_TOKENS / buffers)
    return min(LARGEST_CHUNK, affordable // _MULTIPLE * _MULTIPLE)


def chunk_slices(tokens: int, chunk_tokens: int) -> list[slice]:
    """Splits all tokens into chunks of at most `chunk_tokens`."""
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def sampled_slices(index: Tensor, chunks: list[slice]) -> list[slice]:
    """For each chunk, the entries of an ascending index that fall into it. One host synchronization."""
    entries = index.tolist()
    stops = [0, *(bisect_left(entries, chunk.stop) for chunk in chunks)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


@dataclass(frozen=True)
class Chunk:
    """Inputs of the loss of one chunk; the [C, V] tensors are overwritten."""

    student: Tensor
    """W_s·h [C, V]."""
    anchor: Tensor | None
    """W·anchor [C, V]."""
    shift: Tensor | None
    """W·d [C, V]."""
    shift_mean: Tensor | None
    """w̄·d [C]; None if `shift` is None."""
    weights: Tensor
    """Factor of each token's gradient [C]."""
    gradient: Tensor | None
    """Buffer for weights · dD/dz, where z is `student` before the temperature; None overwrites `student` instead."""
    needs_gradient: bool
    signal_stats: Tensor | None
    """This shard's statistics of the chunk's diagnosed tokens, gathered by the first collective."""
    token_stats: Tensor | None
    """`token_log_probs.token_stats` of this shard [K, C], gathered by the first collective; None computes no
    log-probabilities."""

    @property
    def target(self) -> Tensor:
        """The buffer to which `shard_stats` writes the logits of the target."""
        target = self.shift if self.anchor is None else self.anchor
        assert target is not None
        return target

    def gradient_of(self, tile: slice) -> Tensor | None:
        """The part of `gradient` for one tile."""
        return None if self.gradient is None else self.gradient[tile]


class ChunkResult(NamedTuple):
    """Loss and statistics of one chunk, replicated over the group."""

    loss: Tensor
    """Divergence of each token [C]."""
    statistics: Tensor
    """Token statistics [S, C] in the order of `TOKEN_STATISTICS`."""
    signal_stats: Tensor | None
    """`Chunk.signal_stats` of every rank [P, ...]."""
    log_probs: Tensor | None
    """The student's log-probability of each response token at temperature 1 [C]; None without `Chunk.token_stats`."""
    is_open: Tensor | None
    """1 for each open token, otherwise 0 [C]; None without gates."""
