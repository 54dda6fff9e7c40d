"""The loss from hidden states: exact, full vocabulary, chunk by chunk, closed-form gradients (*ours*).

A target token is two vectors of size H (`hidden_pair`) instead of three rows of size V, and the logits of one chunk
of tokens at a time are all that exists of them. Gradients are formed with the loss, in the forward pass, while the
chunk's logits are at hand; the backward pass only scales them.

Legend: N tokens, C tokens of a chunk, H hidden size, V rows of the true vocabulary on this rank, W rows with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_popsd.distillation.closed_form import chunk_divergence
from nemo_popsd.distillation.collectives import reduce_sum_
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.products import logits, product, statistics_dtype
from nemo_popsd.distillation.statistics import TokenStatistics
from nemo_popsd.distillation.target import Target, uses_anchor, uses_shift
from nemo_popsd.distillation.vocabulary import mean_row, true_width

_LOW_PRECISION = (torch.bfloat16,)
_FULL_PRECISION = (torch.float32, torch.float64)


class HiddenLoss(NamedTuple):
    """What `loss_from_hidden` returns. Only `total` has a gradient."""

    total: Tensor
    """Σ_n token_weights[n] · per_token[n], a scalar: the loss to call backward on."""

    per_token: Tensor
    """The divergence of each token, unweighted [N], detached: for logging."""

    statistics: TokenStatistics | None
    """Per-token statistics where asked for."""


@dataclass(frozen=True)
class _Plan:
    """Everything constant that the autograd Function needs."""

    target: Target
    divergence: Divergence
    anchor: Tensor | None
    shift: Tensor | None
    teacher: Tensor
    centre: Tensor | None
    token_weights: Tensor | None
    valid: int
    chunk_tokens: int
    tp_group: dist.ProcessGroup | None
    hidden_gradient: bool
    weight_gradient: bool
    statistics: bool


def loss_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    anchor_hidden: Tensor | None,
    shift_hidden: Tensor | None,
    teacher_weight: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights: Tensor | None = None,
    chunk_tokens: int = 1024,
    centre: Tensor | None = None,
    return_statistics: bool = False,
) -> HiddenLoss:
    """Divergence of the student from the target, weighted and summed over tokens, without full logits.

        p = softmax(W_s·h / τ)
        q = softmax(W·anchor/τ + a_T·c·tanh((W·d − w̄·d)/(τ·c)) + a_S·sg[W_s·h/τ])
        total = Σ_n token_weights[n] · D(p_n, q_n)

    which is eq. 13-18 for `PurifiedTarget`. Why a weighted sum, and not the [N] losses: the gradients are formed in
    the forward pass and that of `student_weight` is summed over the tokens there, so a token's weight must be known
    by then. Give 1/(number of tokens), or 1/(sequences · length of the token's sequence), as `token_weights`, and call
    backward on `total`, possibly scaled by any scalar. `per_token` is detached: a loss built from it has no gradient.

    Sharding: hidden states are replicated over `tp_group`, the two matrices are this rank's rows. All ranks of the
    group have the same N. The gradient of `student_hidden` is the full one, summed over `tp_group` here, as
    Megatron's output layer does it (so hand in hidden states that were gathered with no sum in their own backward);
    the gradient of `student_weight` is this rank's rows, with zeros in padding.

    Collectives: for each chunk 2 for the KLs and 3 for the JSD, on at most [6, C] floats; 1 on [H] where `centre` is
    needed and not given; backward 1 on [N, H] where `student_hidden` needs a gradient.

    Precision: products of matrices in the dtype of the matrix, everything else in fp32 (float64 where
    `student_weight` is float64). The gradient of `student_weight` is summed over the chunks in fp32 and rounded once.

    Memory: three [C, V] tensors in fp32 for the KLs, four for the JSD or with statistics; [N, H] for the gradient of
    the hidden states and [V_pad/tp, H] in fp32 for that of the matrix. What needs no gradient costs nothing: a frozen
    or LoRA-covered `student_weight`, or anything under torch.no_grad.

    Args:
        student_hidden: h [N, H], final hidden state after the last norm, at the response positions only.
        student_weight: W_s [V_pad/tp, H], live.
        anchor_hidden: [N, H] from `hidden_pair`.
        shift_hidden: d [N, H] from `hidden_pair`, in fp32: it is rounded once, to the dtype of the matrix.
        teacher_weight: W [V_pad/tp, H], frozen; may be the same tensor as `student_weight`.
        target: the family member that `hidden_pair` was given.
        divergence: which divergence.
        vocab_size: size of the true vocabulary.
        tp_group: the group over which the vocabulary is sharded; None for one shard.
        token_weights: [N], constants; None for 1 each, which makes `total` the plain sum.
        chunk_tokens: tokens of a chunk: memory against the number of kernels and collectives.
        centre: w̄ = `mean_row(teacher_weight, ...)`, computed here where needed and None.
        return_statistics: also return `TokenStatistics`; no further matrix product or collective.

    Raises:
        UserError: the shards together are smaller than the vocabulary.
        ValueError: shapes, dtypes or vectors do not fit each other or the target.
    """
    _check(student_hidden, student_weight, anchor_hidden, shift_hidden, teacher_weight, target, token_weights)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; need at least 1")
    valid = true_width(student_weight.shape[0], vocab_size, tp_group)
    if shift_hidden is not None and centre is None:
        centre = mean_row(teacher_weight, vocab_size, tp_group)
    record = torch.is_grad_enabled()
    plan = _Plan(
        target=target,
        divergence=divergence,
        anchor=None if anchor_hidden is None else anchor_hidden.detach(),
        shift=None if shift_hidden is None else shift_hidden.detach(),
        teacher=teacher_weight.detach(),
        centre=centre,
        token_weights=token_weights,
        valid=valid,
        chunk_tokens=chunk_tokens,
        tp_group=tp_group,
        hidden_gradient=record and student_hidden.requires_grad,
        weight_gradient=record and student_weight.requires_grad,
        statistics=return_statistics,
    )
    with torch.autocast(student_hidden.device.type, enabled=False):
        total, per_token, statistics_4N = _HiddenLossFunction.apply(student_hidden, student_weight, plan)
    return HiddenLoss(total, per_token, TokenStatistics(*statistics_4N) if return_statistics else None)


class _HiddenLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_NH: Tensor, w_WH: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = statistics_dtype(w_WH)
        tokens = h_NH.shape[0]
        per_token_N = h_NH.new_empty(tokens, dtype=dtype)
        statistics_4N = h_NH.new_empty(4, tokens, dtype=dtype) if plan.statistics else None
        dh_NH = torch.empty_like(h_NH) if plan.hidden_gradient else None
        dw_WH = torch.zeros_like(w_WH, dtype=dtype) if plan.weight_gradient else None
        w_VH = w_WH[: plan.valid]
        for start in range(0, tokens, plan.chunk_tokens):
            chunk = slice(start, start + plan.chunk_tokens)
            s_CV = logits(h_NH[chunk], w_VH, dtype, plan.target.temperature)
            t_CV = _target_logits(plan, chunk, s_CV, dtype)
            result = chunk_divergence(
                s_CV,
                t_CV,
                plan.divergence,
                plan.tp_group,
                gradient=dh_NH is not None or dw_WH is not None,
                statistics=plan.statistics,
            )
            per_token_N[chunk] = result.loss
            if statistics_4N is not None and result.statistics is not None:
                statistics_4N[:, chunk] = result.statistics
            gradient_CV = result.gradient
            if gradient_CV is None:
                continue
            del s_CV, t_CV, result  # all but the gradient's own memory is free for the products below
            if plan.token_weights is not None:
                gradient_CV.mul_((plan.token_weights[chunk, None] / plan.target.temperature).to(dtype))
            elif plan.target.temperature != 1:
                gradient_CV.div_(plan.target.temperature)
            if dh_NH is not None:
                dh_NH[chunk] = gradient_CV.to(w_VH.dtype) @ w_VH
            if dw_WH is not None:
                _accumulate(dw_WH[: plan.valid], gradient_CV, h_NH[chunk], w_VH.dtype)
            del gradient_CV  # or the next chunk would come on top of it
        total = per_token_N.sum() if plan.token_weights is None else (per_token_N * plan.token_weights).sum()
        ctx.save_for_backward(dh_NH, dw_WH)
        ctx.tp_group = plan.tp_group
        ctx.weight_dtype = w_WH.dtype
        ctx.mark_non_differentiable(per_token_N, *(() if statistics_4N is None else (statistics_4N,)))
        return total.to(dtype), per_token_N, statistics_4N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        upstream = gradients[0]
        dh_NH, dw_WH = ctx.saved_tensors
        if dh_NH is not None:
            dh_NH = reduce_sum_(dh_NH * upstream.to(dh_NH.dtype), ctx.tp_group) if dh_NH.numel() else dh_NH
        if dw_WH is not None:
            dw_WH = torch.mul(dw_WH, upstream, out=torch.empty_like(dw_WH, dtype=ctx.weight_dtype))
        return dh_NH, dw_WH, None


def _target_logits(plan: _Plan, chunk: slice, s_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of the target, up to a constant in each row; at most two [C, V] tensors beside `s_CV`."""
    target = plan.target
    w_VH = plan.teacher[: plan.valid]
    t_CV: Tensor | None = None
    if plan.shift is not None:
        assert target.cap is not None
        assert plan.centre is not None
        d_CH = plan.shift[chunk].to(w_VH.dtype)
        mean_C = d_CH.to(dtype) @ plan.centre.to(dtype)
        scale = target.temperature * target.cap
        t_CV = product(d_CH, w_VH.t(), dtype).sub_(mean_C[:, None]).mul_(1 / scale)
        t_CV.tanh_().mul_(target.privileged * target.cap)
    if plan.anchor is not None:
        anchor_CV = logits(plan.anchor[chunk], w_VH, dtype, target.temperature)
        t_CV = anchor_CV if t_CV is None else anchor_CV.add_(t_CV)
    assert t_CV is not None
    if target.student != 0:
        t_CV.add_(s_CV, alpha=target.student)
    return t_CV


def _accumulate(dw_VH: Tensor, gradient_CV: Tensor, h_CH: Tensor, weight_dtype: torch.dtype) -> None:
    """Add gradientᵀ·h to dW, with the sum in the dtype of dW."""
    if weight_dtype in _LOW_PRECISION and dw_VH.is_cuda:
        dw_VH.add_(torch.mm(gradient_CV.to(weight_dtype).t(), h_CH.to(weight_dtype), out_dtype=dw_VH.dtype))
    else:
        dw_VH.addmm_(gradient_CV.t(), h_CH.to(dw_VH.dtype))


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    anchor_hidden: Tensor | None,
    shift_hidden: Tensor | None,
    teacher_weight: Tensor,
    target: Target,
    token_weights: Tensor | None,
) -> None:
    tokens, width = student_hidden.shape
    shapes = {
        "student_weight": (student_weight, (student_weight.shape[0], width)),
        "teacher_weight": (teacher_weight, (student_weight.shape[0], width)),
        "anchor_hidden": (anchor_hidden, (tokens, width)),
        "shift_hidden": (shift_hidden, (tokens, width)),
        "token_weights": (token_weights, (tokens,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; need {shape}")
    for name, tensor in {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_weight": teacher_weight,
    }.items():
        if tensor.dtype not in _LOW_PRECISION + _FULL_PRECISION:
            raise ValueError(f"{name} is {tensor.dtype}; need bfloat16, float32 or float64")
    for name, tensor, used in (
        ("anchor_hidden", anchor_hidden, uses_anchor(target)),
        ("shift_hidden", shift_hidden, uses_shift(target)),
    ):
        if (tensor is not None) != used:
            raise ValueError(f"{name} must {'' if used else 'not '}be given for {target}; see hidden_pair")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights requires grad; the loss is not differentiable in it: detach it")
