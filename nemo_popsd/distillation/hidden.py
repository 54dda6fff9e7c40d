"""The loss from hidden states: exact, full vocabulary, chunk by chunk, closed-form gradients (*ours*).

Two vectors of size H (`hidden_pair`) determine the target of a token, instead of three vectors of size V, and only the
logits of one chunk of tokens exist at a time. Gradients are computed with the loss, in the forward pass, while the
chunk's logits exist; the backward pass only scales them.

Legend: N tokens, C tokens of a chunk, D diagnosed tokens, H hidden size, V true vocabulary entries of this
rank, W entries with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_popsd.distillation.checks import check_inputs
from nemo_popsd.distillation.chunked_loss import ChunkedLoss, LossSpec
from nemo_popsd.distillation.chunks import default_chunk_tokens
from nemo_popsd.distillation.decomposition import DiagnosedTokens, signal_statistics
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.fusion import choose_kernels
from nemo_popsd.distillation.gates import Gates
from nemo_popsd.distillation.main_gradient import MainGradient
from nemo_popsd.distillation.products import statistics_dtype
from nemo_popsd.distillation.statistics import TOKEN_STATISTICS, StatisticValues
from nemo_popsd.distillation.target import HiddenPair
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.parallel.collectives import reduce_sum_
from nemo_popsd.parallel.vocabulary import VocabShard, mean_output_vector

_NO_GATES = Gates()
_UPSTREAM_TOLERANCE = 1e-4
"""Relative tolerance: a trainer divides by the number of micro-batches and multiplies by it again, in fp32."""


class HiddenLoss(NamedTuple):
    """Results of `loss_from_hidden`. Only `total` has a gradient."""

    total: Tensor
    """Σ_n token_weights[n] · is_open[n] · per_token[n], a scalar; call backward on it."""

    per_token: Tensor
    """The unweighted divergence of each token [N], detached, for logging."""

    statistics: StatisticValues
    """`TOKEN_STATISTICS` of all tokens [N]."""

    decomposition: StatisticValues | None
    """`SIGNAL_STATISTICS` of the diagnosed tokens [D]; None if `diagnosed` was not passed."""

    log_probs: Tensor | None
    """The student's log-probabilities of `response_ids` [N] at temperature 1, detached; None if not passed."""
    is_open: Tensor | None
    """1 for each open token, otherwise 0 [N]; None without gates."""


def loss_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    vectors: HiddenPair,
    teacher_weight: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    shard: VocabShard,
    gates: Gates = _NO_GATES,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    centre: Tensor | None = None,
    fused: str = "auto",
    main_gradient: MainGradient | None = None,
    diagnosed: DiagnosedTokens | None = None,
    response_ids: Tensor | None = None,
) -> HiddenLoss:
    """Divergence of the student from the target, weighted and summed over tokens, without materializing all logits.

        p = softmax(W_s·h / τ)
        q = softmax(W·anchor/τ + a_T·c·tanh((W·d − w̄·d)/(τ·c)) + a_S·sg[W_s·h/τ])
        total = Σ_n token_weights[n] · is_open[n] · D(p_n, q_n)

    This is eq. 13-18 for `Target.purified`. The result is a weighted sum rather than [N] losses, because the forward
    pass sums the gradient of `student_weight` over the tokens and needs their weights to do so. Pass
    1/(number of tokens), or 1/(sequences · length of the token's sequence), as `token_weights`, and call backward on
    `total`, possibly scaled by any scalar. `per_token` is detached: a loss built from it has no gradient.

    Sharding: hidden states are replicated over `shard.group`; both matrices are this rank's shards. All ranks of the
    group have the same N and the same diagnosed tokens. The gradient of `student_hidden` is complete: it is summed over
    the group here, as in Megatron's output layer. If the hidden states result from a gather, its backward must not sum
    the gradient again. The gradient of `student_weight` is this rank's shard, with zeros in the padding.

    Matrix products per chunk: one stacked product if student and teacher share the matrix (the same storage), otherwise
    one per vector; one for dh and one for dW. Collectives per chunk: 1 for the KLs (an all-gather of 8 floats per
    token, and one or two more floats with `response_ids`); 2 for the JSD and with a clip (the second is an all-reduce
    of 2 floats per token). Each overlaps with the products of the previous chunk (dh and dW). In addition, 1 on [H] if
    `centre` is needed and not passed, and in backward 1 on [N, H] if `student_hidden` needs a gradient.

    Precision: matrix products use the dtype of the matrix, everything else fp32 (float64 if `student_weight` is
    float64). The gradient of `student_weight` is summed over the chunks in fp32 and rounded once.

    Memory: one fp32 [C, V] tensor for the student and one for each vector of the target; one for the gradient (in the
    matrix's dtype) with more than one shard or in bf16; the products of the diagnosed tokens; dh of [N, H]; dW in fp32
    unless `main_gradient` is passed. A gradient that is not needed takes no memory: that of a frozen or LoRA-covered
    `student_weight`, or any under torch.no_grad. `benchmarks/README.md` has measurements.

    Args:
        student_hidden: h [N, H], final hidden state after the last norm, at the response positions only.
        student_weight: W_s [V_pad/tp, H], live.
        vectors: `hidden_pair` of N tokens. A shift is in fp32 and is rounded once, to the dtype of the matrix.
        teacher_weight: W [V_pad/tp, H], frozen; may be the same tensor as `student_weight`.
        target: the target that `vectors` belong to.
        divergence: kind, weight and clip of the divergence.
        shard: the vocabulary entries that the matrices hold.
        gates: conditions that close tokens; a closed token has loss and gradient 0 and remains in `per_token`. Gates
            add no pass over the vocabulary and no collective.
        token_weights: constant weights [N]; None weights each token by 1, so that `total` is the plain sum.
        chunk_tokens: tokens of a chunk; None limits the chunk's buffers to 0.4 of an fp32 [8192, V] tensor.
        centre: w̄ = `mean_output_vector(teacher_weight, shard)`; computed here if it is needed and None.
        fused: whether the arithmetic between products is compiled: `auto`, `always` or `never`; see `fusion`.
        main_gradient: buffer to which the gradient of `student_weight` is added; None returns it to autograd.
        diagnosed: tokens on which to decompose the teacher's signal; their states join the products.
        response_ids: ids of the predicted tokens, int64 [N]; if passed, the student's log-probabilities of them are
            returned. No other result changes.

    Raises:
        UserError: `fused` is unknown.
        ValueError: shapes, dtypes or vectors do not fit each other or the target, `token_weights` requires grad, or
            `chunk_tokens` is below 1.
        RuntimeError: backward does not multiply the loss by `main_gradient.upstream`, or runs twice.
    """
    dtype = statistics_dtype(student_weight)
    check_inputs(
        student_hidden,
        student_weight,
        vectors,
        teacher_weight,
        target,
        shard,
        token_weights,
        diagnosed,
        main_gradient,
        response_ids,
    )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; need at least 1")
    if vectors.shift is not None and centre is None:
        centre = mean_output_vector(teacher_weight, shard)
    record = torch.is_grad_enabled()
    gradients = record and (student_hidden.requires_grad or student_weight.requires_grad)
    # The gradient needs its own buffer if it outlives the chunk's logits or has a smaller dtype.
    rounded = student_weight.is_cuda and student_weight.dtype != dtype
    separate_gradient = gradients and (rounded or shard.ranks > 1)
    buffers = 1 + target.vectors + (0.5 if rounded else 1) * separate_gradient
    spec = LossSpec(
        target=target,
        divergence=divergence,
        gates=gates,
        vectors=HiddenPair(*(None if x is None else x.detach() for x in vectors)),
        teacher=teacher_weight.detach()[: shard.true_width],
        centre=centre,
        token_weights=token_weights,
        diagnosed=diagnosed,
        response_ids=response_ids,
        shard=shard,
        chunk_tokens=default_chunk_tokens(buffers) if chunk_tokens is None else chunk_tokens,
        kernels=choose_kernels(fused, shard.true_width, dtype),
        weight_scale=1.0 if main_gradient is None else main_gradient.upstream,
        hidden_gradient=record and student_hidden.requires_grad,
        weight_gradient=record and student_weight.requires_grad,
        separate_gradient=separate_gradient,
    )
    with torch.autocast(student_hidden.device.type, enabled=False):
        apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]] = _HiddenLossFunction.apply
        total, per_token, statistics_SN, products_5D, log_probs, is_open = apply(
            student_hidden, student_weight, spec, main_gradient
        )
    return HiddenLoss(
        total,
        per_token,
        StatisticValues(TOKEN_STATISTICS, statistics_SN),
        None if diagnosed is None else signal_statistics(products_5D),
        None if response_ids is None else log_probs,
        is_open,
    )


class _LossContext(Protocol):
    main_gradient: MainGradient | None
    spent: bool
    group: dist.ProcessGroup | None
    weight_shape: torch.Size
    weight_dtype: torch.dtype

    @property
    def saved_tensors(self) -> tuple[Tensor | None, Tensor | None]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _HiddenLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LossContext, h_NH: Tensor, w_WH: Tensor, spec: LossSpec, main_gradient: MainGradient | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        dh_NH = torch.empty_like(h_NH) if spec.hidden_gradient else None
        dw_WH = None
        if spec.weight_gradient:
            dtype = statistics_dtype(w_WH)
            dw_WH = torch.zeros_like(w_WH, dtype=dtype) if main_gradient is None else main_gradient.buffer
        loss = ChunkedLoss(spec, h_NH, w_WH.detach()[: spec.shard.true_width], dh_NH, dw_WH)
        loss()
        weighted_N = loss.per_token_N if spec.token_weights is None else loss.per_token_N * spec.token_weights
        total = (weighted_N if loss.open_N is None else weighted_N * loss.open_N).sum()
        ctx.main_gradient = main_gradient if spec.weight_gradient else None
        ctx.spent = False
        ctx.save_for_backward(dh_NH, dw_WH if ctx.main_gradient is None else None)
        ctx.group = spec.shard.group
        ctx.weight_shape, ctx.weight_dtype = w_WH.shape, w_WH.dtype
        reported = (loss.per_token_N, loss.statistics_SN, loss.products_5D, loss.log_probs_N)
        ctx.mark_non_differentiable(*reported, *(() if loss.open_N is None else (loss.open_N,)))
        return total.to(loss.per_token_N.dtype), *reported, loss.open_N

    @staticmethod
    @once_differentiable
    def backward(ctx: _LossContext, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        upstream = gradients[0]
        dh_NH, dw_WH = ctx.saved_tensors
        if dh_NH is not None:
            dh_NH = reduce_sum_(dh_NH * upstream.to(dh_NH.dtype), ctx.group) if dh_NH.numel() else dh_NH
        if ctx.main_gradient is not None:
            _check_upstream(ctx, ctx.main_gradient, upstream)
            if ctx.main_gradient.placeholder:
                dw_WH = upstream.new_zeros(ctx.weight_shape, dtype=ctx.weight_dtype)
        elif dw_WH is not None:
            dw_WH = torch.mul(dw_WH, upstream, out=torch.empty_like(dw_WH, dtype=ctx.weight_dtype))
        return dh_NH, dw_WH, None, None


def _check_upstream(ctx: _LossContext, main_gradient: MainGradient, upstream: Tensor) -> None:
    """Raises if the backward pass does not scale the loss as the forward pass assumed."""
    if ctx.spent:
        raise RuntimeError("a second backward pass over a loss that added its gradient to main_gradient")
    ctx.spent = True
    stated = main_gradient.upstream
    agrees = (upstream - stated).abs() <= _UPSTREAM_TOLERANCE * abs(stated)
    # The check runs on the GPU, so the host does not wait for it.
    torch._assert_async(agrees, f"backward does not multiply the loss by main_gradient.upstream={stated}")
