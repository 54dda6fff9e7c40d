"""The tokens that the loss computes together: their number (few need less memory, many make products efficient), what
their loss is computed from, and its result.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


@dataclass(frozen=True)
class Chunk:
    """What the loss of one chunk is computed from; the [C, V] tensors are overwritten."""

    student: Tensor
    """W_s·h [C, V]."""
    anchor: Tensor | None
    """W·anchor [C, V]."""
    shift: Tensor | None
    """W·d [C, V]."""
    shift_mean: Tensor | None
    """w̄·d [C], with `shift`."""
    weights: Tensor
    """[C]: factor of each token's gradient."""
    gradient: Tensor | None
    """Buffer for weights · dD/dz, where z is `student` before the temperature; None writes it over `student`."""
    needs_gradient: bool
    signal_stats: Tensor | None
    """This shard's statistics of the chunk's diagnosed tokens, gathered by the first collective."""
    token_stats: Tensor | None
    """`token_log_probs.token_stats` of this shard [K, C], gathered likewise; None leaves the log-probabilities out."""

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
    """[C]."""
    statistics: Tensor
    """[S, C], by `TOKEN_STATISTICS`."""
    signal_stats: Tensor | None
    """[P, ...]: `Chunk.signal_stats` of each rank."""
    log_probs: Tensor | None
    """[C]: the student's log-probability of each response token at temperature 1, with `Chunk.token_stats`."""
    is_open: Tensor | None
    """[C]: 1 for each token that is open, else 0, where there are gates."""
