"""The loss from hidden states: exact, full vocabulary, chunk by chunk, closed-form gradients (*ours*).

A target token is two vectors of size H (`hidden_pair`) instead of three rows of size V, and the logits of one chunk
of tokens at a time are all that exists of them. Gradients are formed with the loss, in the forward pass, while the
chunk's logits are at hand; the backward pass only scales them.

Legend: N tokens, C tokens of a chunk, D sampled tokens, H hidden size, V rows of the true vocabulary on this rank,
W rows with padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_popsd.distillation.checks import check_inputs
from nemo_popsd.distillation.chunks import chunk_slices, default_chunk_tokens, sampled_slices
from nemo_popsd.distillation.closed_form import ChunkDivergence, ChunkLogits, Overlap
from nemo_popsd.distillation.collectives import group_size, reduce_sum_
from nemo_popsd.distillation.decomposition import (
    DecompositionStatistics,
    DiagnosedTokens,
    decompose,
    decomposition_statistics,
    measure_sample,
)
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.fusion import Stages, choose_stages
from nemo_popsd.distillation.products import ChunkProducts, Products, add_product_, product_into, statistics_dtype
from nemo_popsd.distillation.statistics import TokenStatistics
from nemo_popsd.distillation.target import FrozenStates, HiddenPair, Target
from nemo_popsd.distillation.vocabulary import mean_row, true_width, true_widths


class HiddenLoss(NamedTuple):
    """What `loss_from_hidden` returns. Only `total` has a gradient."""

    total: Tensor
    """Σ_n token_weights[n] · per_token[n], a scalar: the loss to call backward on."""

    per_token: Tensor
    """The divergence of each token, unweighted [N], detached: for logging."""

    statistics: TokenStatistics
    """Per-token statistics [N]."""

    decomposition: DecompositionStatistics | None
    """Statistics of the sampled tokens [D], where any were given."""


@dataclass(frozen=True)
class MainGradient:
    """Where a trainer keeps the gradient of the output matrix, so that no second tensor of its size is needed.

    A gradient formed in the forward pass must be scaled by then: the trainer states what backward will multiply the
    loss with, and backward raises where it does not. One forward pass, then one backward pass.
    """

    buffer: Tensor
    """[V_pad/tp, H] in fp32 (float64 for float64); the gradient is added to it in the forward pass."""

    upstream: float
    """Derivative of what backward is called on with respect to the loss's `total`."""

    placeholder: bool = False
    """Whether autograd must still hand zeros of the matrix's size to the parameter's hooks, which count on some
    gradient (Megatron's, where it overlaps the reduction of gradients with the backward pass). Else the parameter
    gets none from the loss."""


@dataclass(frozen=True)
class _Plan:
    """Everything constant that the autograd Function needs."""

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
    main_gradient: MainGradient | None
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


def loss_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    frozen: FrozenStates,
    teacher_weight: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    centre: Tensor | None = None,
    soft_cap: float | None = None,
    fused: str = "auto",
    main_gradient: MainGradient | None = None,
    diagnosed: DiagnosedTokens | None = None,
) -> HiddenLoss:
    """Divergence of the student from the target, weighted and summed over tokens, without full logits.

        p = softmax(W_s·h / τ)
        q = softmax(W·anchor/τ + a_T·c·tanh((W·d − w̄·d)/(τ·c)) + a_S·sg[W_s·h/τ])
        total = Σ_n token_weights[n] · D(p_n, q_n)

    which is eq. 13-18 for `PurifiedTarget`. Why a weighted sum, and not the [N] losses: the gradients are formed in
    the forward pass and that of `student_weight` is summed over the tokens there, so a token's weight must be known
    by then. Give 1/(number of tokens), or 1/(sequences · length of the token's sequence), as `token_weights`, and call
    backward on `total`, possibly scaled by any scalar. `per_token` is detached: a loss built from it has no gradient.

    A model that caps its logits softly, z = κ·tanh(W·h/κ), has no such form in two vectors: with `soft_cap`, each
    branch of the target has its own product and the mean of eq. 14 its own all-reduce; the gradient goes through κ.

    Sharding: hidden states are replicated over `tp_group`, the two matrices are this rank's rows. All ranks of the
    group have the same N and the same diagnosed tokens. The gradient of `student_hidden` is the full one, summed over
    `tp_group` here, as Megatron's output layer does it (so hand in hidden states that were gathered with no sum in
    their own backward); the gradient of `student_weight` is this rank's rows, with zeros in padding.

    Products for each chunk of tokens: one stacked product where student and teacher share the matrix (told by their
    storage), else one for each vector; one for dh and one for dW. Collectives for each chunk: 1 for the KLs (an
    all-gather of 8 floats per token) and 2 for the JSD (an all-reduce of 2 more); 1 more for a softly capped model with
    a capped target. Each is under way while the products of the chunk before are computed (dh and dW). 1 on [H] where
    `centre` is needed and not given; backward 1 on [N, H] where `student_hidden` needs a gradient.

    Precision: products of matrices in the dtype of the matrix, everything else in fp32 (float64 where
    `student_weight` is float64). The gradient of `student_weight` is summed over the chunks in fp32 and rounded once.

    Memory: a [C, V] tensor in fp32 for the student and one for each vector of the target, plus one for the gradient
    (in the matrix's dtype) with more than one shard or in bf16, plus the rows of diagnosed tokens; plus dh of
    [N, H]; plus dW in fp32, unless there is a `main_gradient`. What needs no gradient costs nothing: a frozen
    or LoRA-covered `student_weight`, or anything under torch.no_grad. `benchmarks/README.md` has the figures.

    Args:
        student_hidden: h [N, H], final hidden state after the last norm, at the response positions only.
        student_weight: W_s [V_pad/tp, H], live.
        frozen: from `frozen_states` (or `hidden_pair`): vectors of N tokens. A shift is in fp32, and rounded once, to
            the dtype of the matrix.
        teacher_weight: W [V_pad/tp, H], frozen; may be the same tensor as `student_weight`.
        target: the family member that `frozen` was made for.
        divergence: which divergence.
        vocab_size: size of the true vocabulary.
        tp_group: the group over which the vocabulary is sharded; None for one shard.
        token_weights: [N], constants; None for 1 each, which makes `total` the plain sum.
        chunk_tokens: tokens of a chunk; None takes what keeps the chunk's buffers within 0.4 of an fp32 [8192, V].
        centre: w̄ = `mean_row(teacher_weight, ...)`, computed here where needed and None.
        soft_cap: κ of a model that caps its logits softly; `frozen` is then `SeparateStates`.
        fused: `auto`, `true` or `false`: whether the arithmetic between products is compiled; see `fusion`.
        main_gradient: where to add the gradient of `student_weight`; None gives it to autograd.
        diagnosed: tokens on which to decompose the teacher's signal; adds their rows to the products.

    Raises:
        UserError: the shards together are smaller than the vocabulary, or `fused` is unknown.
        ValueError: shapes, dtypes or vectors do not fit each other or the target.
        RuntimeError: in backward, where it does not keep what `main_gradient` states.
    """
    states = {name: state.detach() for name, state in frozen._asdict().items() if state is not None}
    dtype = statistics_dtype(student_weight)
    check_inputs(student_hidden, student_weight, frozen, teacher_weight, target, token_weights, diagnosed, soft_cap)
    if main_gradient is not None and (
        main_gradient.buffer.shape != student_weight.shape or main_gradient.buffer.dtype != dtype
    ):
        got = f"{main_gradient.buffer.dtype} of shape {tuple(main_gradient.buffer.shape)}"
        raise ValueError(f"main_gradient is {got}; need {dtype} of shape {tuple(student_weight.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; need at least 1")
    valid = true_width(student_weight.shape[0], vocab_size, tp_group)
    if isinstance(frozen, HiddenPair) and frozen.shift is not None and centre is None:
        centre = mean_row(teacher_weight, vocab_size, tp_group)
    record = torch.is_grad_enabled()
    gradients = record and (student_hidden.requires_grad or student_weight.requires_grad)
    # The gradient needs memory of its own where it outlives the chunk's logits, or is smaller than they are.
    rounded = student_weight.is_cuda and student_weight.dtype != dtype
    own_gradient = gradients and (rounded or group_size(tp_group) > 1)
    buffers = 1 + len(states) + (soft_cap is not None) + (0.5 if rounded else 1) * own_gradient
    plan = _Plan(
        target=target,
        divergence=divergence,
        frozen=states,
        teacher=teacher_weight.detach()[:valid],
        centre=centre,
        soft_cap=soft_cap,
        token_weights=token_weights,
        diagnosed=diagnosed,
        vocab_size=vocab_size,
        widths=true_widths(student_weight.shape[0], vocab_size, tp_group),
        valid=valid,
        chunk_tokens=default_chunk_tokens(buffers) if chunk_tokens is None else chunk_tokens,
        stages=choose_stages(fused, valid, dtype),
        tp_group=tp_group,
        main_gradient=main_gradient,
        hidden_gradient=record and student_hidden.requires_grad,
        weight_gradient=record and student_weight.requires_grad,
        own_gradient=own_gradient,
    )
    with torch.autocast(student_hidden.device.type, enabled=False):
        total, per_token, statistics_4N, products_5D = _HiddenLossFunction.apply(student_hidden, student_weight, plan)
    return HiddenLoss(
        total,
        per_token,
        TokenStatistics(*statistics_4N),
        None if diagnosed is None else decomposition_statistics(products_5D),
    )


class _HiddenLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_NH: Tensor, w_WH: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dh_NH = torch.empty_like(h_NH) if plan.hidden_gradient else None
        dw_WH = None
        if plan.weight_gradient:
            into = plan.main_gradient
            dw_WH = torch.zeros_like(w_WH, dtype=statistics_dtype(w_WH)) if into is None else into.buffer
        run = _Run(plan, h_NH, w_WH.detach()[: plan.valid], dh_NH, dw_WH)
        run()
        weights_N = plan.token_weights
        total = run.per_token_N.sum() if weights_N is None else (run.per_token_N * weights_N).sum()
        ctx.save_for_backward(dh_NH, None if plan.main_gradient is not None else dw_WH)
        ctx.plan_upstream = None
        if plan.main_gradient is not None and plan.weight_gradient:
            ctx.plan_upstream = plan.main_gradient.upstream
            ctx.placeholder = w_WH.shape if plan.main_gradient.placeholder else None
        ctx.tp_group = plan.tp_group
        ctx.weight_dtype = w_WH.dtype
        ctx.spent = False
        ctx.mark_non_differentiable(run.per_token_N, run.statistics_4N, run.products_5D)
        return total.to(run.per_token_N.dtype), run.per_token_N, run.statistics_4N, run.products_5D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        upstream = gradients[0]
        dh_NH, dw_WH = ctx.saved_tensors
        if dh_NH is not None:
            dh_NH = reduce_sum_(dh_NH * upstream.to(dh_NH.dtype), ctx.tp_group) if dh_NH.numel() else dh_NH
        if ctx.plan_upstream is not None:
            if ctx.spent:
                raise RuntimeError("a second backward pass over a loss whose gradient went to main_gradient already")
            ctx.spent = True
            agrees = (upstream - ctx.plan_upstream).abs() <= 1e-4 * abs(ctx.plan_upstream)
            torch._assert_async(
                agrees, f"backward multiplies the loss otherwise than by main_gradient.upstream={ctx.plan_upstream}"
            )
            if ctx.placeholder is not None:
                return dh_NH, upstream.new_zeros(ctx.placeholder, dtype=ctx.weight_dtype), None
            return dh_NH, None, None
        if dw_WH is not None:
            dw_WH = torch.mul(dw_WH, upstream, out=torch.empty_like(dw_WH, dtype=ctx.weight_dtype))
        return dh_NH, dw_WH, None


class _Run:
    """One pass over all chunks; fills what it was given."""

    def __init__(self, plan: _Plan, h_NH: Tensor, w_VH: Tensor, dh_NH: Tensor | None, dw_WH: Tensor | None) -> None:
        dtype = statistics_dtype(w_VH)
        tokens = h_NH.shape[0]
        self._plan, self._h_NH, self._w_VH, self._dh_NH = plan, h_NH.detach(), w_VH, dh_NH
        self._dw_VH = None if dw_WH is None else dw_WH[: plan.valid]
        self.per_token_N = h_NH.new_empty(tokens, dtype=dtype)
        self.statistics_4N = h_NH.new_empty(4, tokens, dtype=dtype)
        self.products_5D = h_NH.new_empty(5, 0 if plan.diagnosed is None else len(plan.diagnosed.index), dtype=dtype)
        self._pending: deque[Callable[[], None]] = deque()

    def __call__(self) -> None:
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
            scale = 1.0 if plan.main_gradient is None else plan.main_gradient.upstream
            states = self._h_NH[chunk]
            self._pending.append(partial(add_product_, self._dw_VH, gradient_CV.t(), states, scale))

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
