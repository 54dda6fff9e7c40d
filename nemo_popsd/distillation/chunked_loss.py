"""One pass over the chunks of tokens: losses, statistics and gradients, formed while a chunk's logits are at hand.

Legend: N tokens, C tokens of a chunk, D diagnosed tokens, H hidden size, V rows of the true vocabulary on this rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.chunks import chunk_slices, sampled_slices
from nemo_popsd.distillation.closed_form import ChunkDivergence, ChunkLogits, Overlap
from nemo_popsd.distillation.decomposition import DiagnosedTokens, decompose, measure_sample
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.fusion import Stages
from nemo_popsd.distillation.products import ChunkProducts, Products, add_product_, product_into, statistics_dtype
from nemo_popsd.distillation.target import Target
from nemo_popsd.parallel.collectives import group_size


@dataclass(frozen=True)
class Plan:
    """Everything that stays the same over the chunks."""

    target: Target
    divergence: Divergence
    frozen: dict[str, Tensor]
    teacher: Tensor
    """True rows [V, H]."""
    centre: Tensor | None
    soft_cap: float | None
    token_weights: Tensor | None
    diagnosed: DiagnosedTokens | None
    vocab_size: int
    widths: list[int]
    valid: int
    chunk_tokens: int
    stages: Stages
    tp_group: dist.ProcessGroup | None
    weight_scale: float
    """What the gradient of the matrix is multiplied with."""
    hidden_gradient: bool
    weight_gradient: bool
    own_gradient: bool

    @property
    def sample_states(self) -> dict[str, Tensor]:
        """What the sampled tokens need beside the branches of the target; see `decomposition`."""
        if self.diagnosed is None:
            return {}
        states = {"sampled_privileged": self.diagnosed.privileged.detach()}
        if "shift" not in self.frozen:
            states["sampled_reference"] = self.diagnosed.reference.detach()
        return states


class Sweep:
    """One pass over all chunks; fills what it was given."""

    def __init__(self, plan: Plan, h_NH: Tensor, w_VH: Tensor, dh_NH: Tensor | None, dw_WH: Tensor | None) -> None:
        dtype = statistics_dtype(w_VH)
        tokens = h_NH.shape[0]
        self._plan, self._h_NH, self._w_VH, self._dh_NH = plan, h_NH.detach(), w_VH, dh_NH
        self._dw_VH = None if dw_WH is None else dw_WH[: plan.valid]
        self.per_token_N = h_NH.new_empty(tokens, dtype=dtype)
        self.statistics_4N = h_NH.new_empty(4, tokens, dtype=dtype)
        self.products_5D = h_NH.new_empty(5, 0 if plan.diagnosed is None else len(plan.diagnosed.index), dtype=dtype)
        self._pending: deque[Callable[[], None]] = deque()

    def __call__(self) -> None:
        """Works through all tokens. No tokens: no collective."""
        plan = self._plan
        chunks = chunk_slices(len(self.per_token_N), plan.chunk_tokens)
        if not chunks:
            return
        samples = [slice(0, 0)] * len(chunks)
        if plan.diagnosed is not None:
            samples = sampled_slices(plan.diagnosed.index, chunks)
        products = Products(
            self._h_NH,
            self._w_VH,
            plan.frozen,
            plan.teacher,
            plan.sample_states,
            chunk_tokens=chunks[0].stop,
            sampled_tokens=max(part.stop - part.start for part in samples),
        )
        divergence = ChunkDivergence(
            plan.target,
            plan.divergence,
            plan.stages,
            plan.tp_group,
            vocab_size=plan.vocab_size,
            soft_cap=plan.soft_cap,
            like=self.per_token_N,
        )
        shape, like = (chunks[0].stop, plan.valid), self.per_token_N
        own_CV = None
        if plan.own_gradient:
            own_CV = like.new_empty(shape, dtype=self._w_VH.dtype if self._w_VH.is_cuda else like.dtype)
        bend_CV = None if plan.soft_cap is None else like.new_empty(shape)
        for chunk, sampled in zip(chunks, samples, strict=True):
            self._work_through(products, divergence, chunk, sampled, own_CV, bend_CV)
        self._finish_pending()

    def _work_through(
        self,
        products: Products,
        divergence: ChunkDivergence,
        chunk: slice,
        sampled: slice,
        own_CV: Tensor | None,
        bend_CV: Tensor | None,
    ) -> None:
        plan, tokens = self._plan, chunk.stop - chunk.start
        made = products(chunk, sampled)
        sample = self._measure_sample(made, chunk, sampled, divergence) if sampled.stop > sampled.start else None
        wanted = self._dh_NH is not None or self._dw_VH is not None
        result = divergence(
            ChunkLogits(
                made.student,
                made.frozen,
                self._mean(products, divergence, made),
                None if bend_CV is None else bend_CV[:tokens],
            ),
            self._weights(chunk),
            None if own_CV is None else own_CV[:tokens],
            gradient=wanted,
            sample=sample,
            overlap=Overlap(self._start_pending, self._finish_pending),
        )
        self.per_token_N[chunk] = result.loss
        self.statistics_4N[:, chunk] = result.statistics
        if result.sample is not None:
            self.products_5D[:, sampled] = decompose(result.sample, plan.widths)
        if wanted:
            self._add_gradients(made.student if own_CV is None else own_CV[:tokens], chunk)
            if group_size(plan.tp_group) == 1:
                self._finish_pending()

    def _weights(self, chunk: slice) -> Tensor:
        """What each token's gradient with respect to W_s·h is multiplied with: its weight over the temperature."""
        plan, like = self._plan, self.per_token_N
        if plan.token_weights is None:
            return torch.full_like(like[chunk], 1 / plan.target.temperature)
        return (plan.token_weights[chunk] / plan.target.temperature).to(like.dtype)

    def _mean(self, products: Products, divergence: ChunkDivergence, made: ChunkProducts) -> Tensor | None:
        plan, tokens = self._plan, made.student.shape[0]
        if "shift" in plan.frozen:
            assert plan.centre is not None
            dtype = self.per_token_N.dtype
            return products.rounded_states("shift", tokens).to(dtype) @ plan.centre.to(dtype)
        if plan.soft_cap is not None and plan.target.cap is not None and plan.target.privileged != 0:
            return divergence.capped_mean(made.frozen["privileged"], made.frozen["reference"])
        return None

    def _measure_sample(self, made: ChunkProducts, chunk: slice, sampled: slice, divergence: ChunkDivergence) -> Tensor:
        """This shard's measures of the chunk's sampled tokens, a tile of rows at a time."""
        plan = self._plan
        assert plan.diagnosed is not None
        index = plan.diagnosed.index[sampled] - chunk.start
        step = plan.stages.tile_rows(plan.valid, self.per_token_N.dtype, index.device)
        parts = []
        for start in range(0, len(index), step):
            rows = slice(start, start + step)
            student = made.student[index[rows]]
            privileged = made.sample["sampled_privileged"][rows]
            if "shift" in made.frozen:
                reference = privileged - made.frozen["shift"][index[rows]]
            else:
                reference = made.sample["sampled_reference"][rows]
            parts.append(measure_sample(*(divergence.scaled(x) for x in (student, privileged, reference))))
        return torch.cat(parts, -1)

    def _add_gradients(self, gradient_CV: Tensor, chunk: slice) -> None:
        """Queues the products of the gradient with the matrix, and with the hidden states."""
        plan = self._plan
        if self._dh_NH is not None:
            # Without dW there is one product, and with a second collective to hide behind it, two halves of it.
            halved = self._dw_VH is None and plan.divergence.kind == "jsd" and group_size(plan.tp_group) > 1
            rows = max(1, -(-len(gradient_CV) // (2 if halved else 1)))
            parts = zip(self._dh_NH[chunk].split(rows), gradient_CV.split(rows), strict=True)
            self._pending.extend(partial(_hidden_gradient, *part, self._w_VH) for part in parts)
        if self._dw_VH is not None:
            states = self._h_NH[chunk]
            self._pending.append(partial(add_product_, self._dw_VH, gradient_CV.t(), states, plan.weight_scale))

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
