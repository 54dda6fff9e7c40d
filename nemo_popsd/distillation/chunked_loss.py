"""One pass over the chunks of tokens; computes losses, statistics and gradients while the logits of a chunk exist.

Legend: N tokens, C tokens of a chunk, D diagnosed tokens, H hidden size, V true vocabulary entries of this
rank, W entries with padding, S token statistics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemo_popsd.distillation.chunks import Chunk, chunk_slices, sampled_slices
from nemo_popsd.distillation.closed_form import ChunkDivergence, Kernels, Overlap
from nemo_popsd.distillation.decomposition import (
    SIGNAL_PRODUCTS,
    DiagnosedTokens,
    merge_signal_shards,
    signal_shard_stats,
)
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.gates import Gates
from nemo_popsd.distillation.products import (
    ChunkProducts,
    Products,
    SampledStates,
    add_product_,
    product_into,
    statistics_dtype,
)
from nemo_popsd.distillation.statistics import TOKEN_STATISTICS
from nemo_popsd.distillation.target import HiddenPair
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.distillation.token_log_probs import token_stats
from nemo_popsd.parallel.vocabulary import VocabShard


@dataclass(frozen=True)
class LossSpec:
    """Arguments of the loss that are the same for all chunks."""

    target: Target
    divergence: Divergence
    gates: Gates
    vectors: HiddenPair
    """Vectors of the target, [N, H] each, detached."""
    teacher: Tensor
    """This rank's shard of the frozen output matrix, without padding: [V, H]."""
    centre: Tensor | None
    """Mean output vector w̄ [H] if the target has a shift."""
    token_weights: Tensor | None
    """Weights of the tokens [N]."""
    diagnosed: DiagnosedTokens | None
    response_ids: Tensor | None
    """[N] vocabulary ids of the tokens, for their log-probabilities."""
    shard: VocabShard
    chunk_tokens: int
    kernels: Kernels
    weight_scale: float
    """Factor that multiplies the gradient of the matrix."""
    hidden_gradient: bool
    """Whether dh is needed."""
    weight_gradient: bool
    """Whether dW is needed."""
    separate_gradient: bool
    """Whether the gradient of the logits has a buffer of its own."""

    @property
    def sampled(self) -> SampledStates | None:
        """States of the diagnosed tokens that join the products; see `decomposition`."""
        if self.diagnosed is None:
            return None
        reference = self.diagnosed.reference.detach() if self.vectors.shift is None else None
        return SampledStates(self.diagnosed.privileged.detach(), reference)


class ChunkedLoss:
    """One pass over all chunks.

    Attributes:
        per_token_N: divergence of each token.
        statistics_SN: token statistics in the order of `TOKEN_STATISTICS`.
        products_5D: `merge_signal_shards` of the diagnosed tokens.
        log_probs_N: the student's log-probability of each token of `LossSpec.response_ids`; empty if that is None.
        open_N: 1 for each open token, otherwise 0; None without gates.
    """

    def __init__(self, spec: LossSpec, h_NH: Tensor, w_VH: Tensor, dh_NH: Tensor | None, dw_WH: Tensor | None) -> None:
        """Allocates the results; `dh_NH` is filled, and the gradient of the matrix is added to `dw_WH`."""
        dtype = statistics_dtype(w_VH)
        tokens = h_NH.shape[0]
        self._spec, self._h_NH, self._w_VH, self._dh_NH = spec, h_NH.detach(), w_VH, dh_NH
        self._dw_VH = None if dw_WH is None else dw_WH[: spec.shard.true_width]
        sampled = 0 if spec.diagnosed is None else len(spec.diagnosed.index)
        self.per_token_N = h_NH.new_empty(tokens, dtype=dtype)
        self.statistics_SN = h_NH.new_empty(len(TOKEN_STATISTICS), tokens, dtype=dtype)
        self.products_5D = h_NH.new_empty(SIGNAL_PRODUCTS, sampled, dtype=dtype)
        self.log_probs_N = h_NH.new_empty(0 if spec.response_ids is None else tokens, dtype=dtype)
        self.open_N = torch.ones_like(self.per_token_N) if spec.gates else None
        self._pending: deque[Callable[[], None]] = deque()

    def __call__(self) -> None:
        """Computes all chunks. No collective if there are no tokens."""
        spec, like = self._spec, self.per_token_N
        chunks = chunk_slices(len(like), spec.chunk_tokens)
        if not chunks:
            return
        samples = [slice(0, 0)] * len(chunks)
        if spec.diagnosed is not None:
            samples = sampled_slices(spec.diagnosed.index, chunks)
        products = Products(
            self._h_NH,
            self._w_VH,
            spec.vectors,
            spec.teacher,
            spec.sampled,
            chunk_tokens=chunks[0].stop,
            sampled_tokens=max(part.stop - part.start for part in samples),
        )
        divergence = ChunkDivergence(spec.target, spec.divergence, spec.gates, spec.kernels, spec.shard, like=like)
        gradient_CV = None
        if spec.separate_gradient:
            dtype = self._w_VH.dtype if self._w_VH.is_cuda else like.dtype
            gradient_CV = like.new_empty((chunks[0].stop, spec.shard.true_width), dtype=dtype)
        for tokens, sampled in zip(chunks, samples, strict=True):
            self._compute(products, divergence, tokens, sampled, gradient_CV)
        self._finish_pending()

    def _compute(
        self,
        products: Products,
        divergence: ChunkDivergence,
        tokens: slice,
        sampled: slice,
        gradient_CV: Tensor | None,
    ) -> None:
        """Computes one chunk, and queues the products of its gradient."""
        spec, count = self._spec, tokens.stop - tokens.start
        logits = products(tokens, sampled)
        needs_gradient = self._dh_NH is not None or self._dw_VH is not None
        chunk = Chunk(
            student=logits.student,
            anchor=logits.anchor,
            shift=logits.shift,
            shift_mean=self._shift_mean(products, count),
            weights=self._weights(tokens),
            gradient=None if gradient_CV is None else gradient_CV[:count],
            needs_gradient=needs_gradient,
            signal_stats=self._signal_stats(logits, tokens, sampled) if sampled.stop > sampled.start else None,
            token_stats=self._token_stats(logits, tokens),
        )
        result = divergence(chunk, Overlap(self._start_pending, self._finish_pending))
        self.per_token_N[tokens] = result.loss
        self.statistics_SN[:, tokens] = result.statistics
        if self.open_N is not None:
            assert result.is_open is not None
            self.open_N[tokens] = result.is_open
        if result.signal_stats is not None:
            self.products_5D[:, sampled] = merge_signal_shards(result.signal_stats, spec.shard.true_widths)
        if result.log_probs is not None:
            self.log_probs_N[tokens] = result.log_probs
        if needs_gradient:
            self._queue_gradients(logits.student if chunk.gradient is None else chunk.gradient, tokens)
            if spec.shard.ranks == 1:
                self._finish_pending()

    def _weights(self, tokens: slice) -> Tensor:
        """Factors of the tokens' gradients with respect to W_s·h: token weight divided by temperature."""
        spec, like = self._spec, self.per_token_N
        if spec.token_weights is None:
            return torch.full_like(like[tokens], 1 / spec.target.temperature)
        return (spec.token_weights[tokens] / spec.target.temperature).to(like.dtype)

    def _shift_mean(self, products: Products, count: int) -> Tensor | None:
        """w̄·d [C], with the rounded d that the product used."""
        if self._spec.vectors.shift is None:
            return None
        assert self._spec.centre is not None
        dtype = self.per_token_N.dtype
        return products.rounded_shift(count).to(dtype) @ self._spec.centre.to(dtype)

    def _token_stats(self, logits: ChunkProducts, tokens: slice) -> Tensor | None:
        """This shard's part of the log-probabilities of the chunk's tokens."""
        spec, width = self._spec, self._spec.shard.true_width
        if spec.response_ids is None:
            return None
        return token_stats(
            logits.student,
            spec.response_ids[tokens],
            spec.shard,
            own_normaliser=spec.target.temperature != 1,
            tile_tokens=spec.kernels.tile_tokens(width, self.per_token_N.dtype, self.per_token_N.device),
        )

    def _signal_stats(self, logits: ChunkProducts, tokens: slice, sampled: slice) -> Tensor:
        """This shard's statistics of the chunk's diagnosed tokens, computed tile by tile."""
        spec, like = self._spec, self.per_token_N
        assert spec.diagnosed is not None
        assert logits.sampled_privileged is not None
        index = spec.diagnosed.index[sampled] - tokens.start
        step = spec.kernels.tile_tokens(spec.shard.true_width, like.dtype, index.device)
        inverse_temperature = like.new_full((), 1 / spec.target.temperature)
        parts = []
        for start in range(0, len(index), step):
            tile = slice(start, start + step)
            student = logits.student[index[tile]]
            privileged = logits.sampled_privileged[tile]
            if logits.shift is not None:
                reference = privileged - logits.shift[index[tile]]
            else:
                assert logits.sampled_reference is not None
                reference = logits.sampled_reference[tile]
            parts.append(signal_shard_stats(*(x * inverse_temperature for x in (student, privileged, reference))))
        return torch.cat(parts, -1)

    def _queue_gradients(self, gradient_CV: Tensor, tokens: slice) -> None:
        """Queues the products of the gradient with the matrix and with the hidden states."""
        spec = self._spec
        if self._dh_NH is not None:
            # Without dW there is one product; two halves of it overlap with the two collectives.
            halved = self._dw_VH is None and spec.divergence.sums_entries and spec.shard.ranks > 1
            pieces = 2 if halved else 1
            parts = zip(self._dh_NH[tokens].chunk(pieces), gradient_CV.chunk(pieces), strict=True)
            self._pending.extend(partial(_hidden_gradient, *part, self._w_VH) for part in parts)
        if self._dw_VH is not None:
            states = self._h_NH[tokens]
            self._pending.append(partial(add_product_, self._dw_VH, gradient_CV.t(), states, spec.weight_scale))

    def _start_pending(self) -> None:
        if self._pending:
            self._pending.popleft()()

    def _finish_pending(self) -> None:
        while self._pending:
            self._pending.popleft()()


def _hidden_gradient(dh_CH: Tensor, gradient_CV: Tensor, w_VH: Tensor) -> None:
    if dh_CH.dtype == w_VH.dtype == gradient_CV.dtype:
        product_into(dh_CH, gradient_CV, w_VH)
    else:
        dh_CH.copy_(gradient_CV.to(w_VH.dtype) @ w_VH)
