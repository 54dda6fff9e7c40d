"""Kernels of Transformer Engine's torch extension, written in torch: norms, products, softmax, rotation, optimizer.

Each has the signature of the compiled one (``transformer_engine_torch``; `tests.te.versions` has what differs between
versions) and computes what that one does, on any device. Options that this project does not use (fp8, communication
overlap, GELU) are refused.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class DType(enum.IntEnum):
    """Element types by the extension's numbers."""

    kByte = 0  # noqa: N815
    kInt32 = 2  # noqa: N815
    kFloat32 = 4  # noqa: N815
    kFloat16 = 5  # noqa: N815
    kBFloat16 = 6  # noqa: N815
    kFloat8E4M3 = 7  # noqa: N815
    kFloat8E5M2 = 8  # noqa: N815
    kFloat4E2M1 = 10  # noqa: N815


TORCH_DTYPE = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}


def refuse(kernel: str, **given: Any) -> None:
    """Raises if one of `given` is set, because the emulation does not implement it."""
    wrong = {name: value for name, value in given.items() if value}
    if wrong:
        raise NotImplementedError(f"{kernel} with {wrong} is not emulated")


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, otype: DType, sm_margin: int, zero: bool
) -> tuple[Tensor, None, Tensor]:
    """[t, h] -> normalised, no mean, and the inverse deviations [t] in fp32."""
    refuse("rmsnorm_fwd", quantizer=quantizer, zero_centered_gamma=zero)
    wide = x.float()
    rsigma = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rsigma[:, None] * weight.float()).to(TORCH_DTYPE[otype])
    return (y if out is None else out.copy_(y)), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight."""
    refuse("rmsnorm_bwd", zero_centered_gamma=zero)
    normed = x.float() * rsigma[:, None]
    upstream = dy.float() * weight.float()
    dx = rsigma[:, None] * (upstream - normed * (upstream * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(B) · op(A), row by row (cuBLAS counts by columns), with a bias, or with the bias's gradient Σ B."""
    refuse("generic_gemm", quantizer=quantizer, gelu=gelu, comm_overlap=comm_overlap, bulk_overlap=bulk_overlap)
    flat_a, flat_b = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    product = alpha * ((flat_b.t() if transb else flat_b) @ (flat_a.t() if transa else flat_a))
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = flat_b.float().sum(0).to(bias.dtype)
        else:
            product = product + bias
    dtype = TORCH_DTYPE[out_dtype] if out_dtype is not None else (B if D is None else D).dtype
    product = product.to(dtype)
    if D is None:
        shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
        return product.view(shape), bias_grad, None, None
    into = D.view(product.shape)
    into.add_(product) if accumulate else into.copy_(product)
    return D, bias_grad, None, None


def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    D: Sequence[Tensor],
    out_dtype: DType,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: DType,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """`generic_gemm` of each pair, into each output or into consecutive rows of one."""
    refuse("te_general_grouped_gemm", bias=any(b.numel() for b in bias))
    outputs = list(D[0].split(list(m_splits))) if single_output else list(D)
    for a, b, into in zip(A, B, outputs, strict=True):
        product = ((b.t() if transb else b) @ (a.t() if transa else a)).to(into.dtype)
        into.add_(product) if accumulate else into.copy_(product)
    return bias


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any]) -> list[Tensor]:
    """Consecutive rows, not quantised."""
    refuse("split_quantize", quantizers=any(q is not None for q in quantizers))
    return list(tensor.split(list(splits)))


def _softmax_backward(dy: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    p, upstream = probabilities.float(), dy.float()
    return (scale * p * (upstream - (upstream * p).sum(-1, keepdim=True))).to(dy.dtype)


def scaled_masked_softmax_forward(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale · scores) over the last of [b, n, s, k], 0 where [b or 1, 1, s, k] `mask` is set."""
    hidden = (scores.float() * scale).masked_fill(mask, -10000.0)
    return torch.softmax(hidden, -1).masked_fill(mask.all(-1, keepdim=True), 0.0).to(scores.dtype)


def scaled_softmax_forward(scores: Tensor, scale: float) -> Tensor:
    """softmax(scale · scores) over the last dimension."""
    return torch.softmax(scores.float() * scale, -1).to(scores.dtype)


def scaled_upper_triang_masked_softmax_forward(scores: Tensor, scale: float) -> Tensor:
    """Causal, [b·n, s, s]."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.softmax((scores.float() * scale).masked_fill(future, -torch.inf), -1).to(scores.dtype)


def scaled_aligned_causal_masked_softmax_forward(scores: Tensor, scale: float) -> Tensor:
    """Causal, [b, n, s, k], the last query at the last key."""
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return torch.softmax((scores.float() * scale).masked_fill(future, -torch.inf), -1).to(scores.dtype)


scaled_masked_softmax_backward = _softmax_backward
scaled_softmax_backward = _softmax_backward
scaled_upper_triang_masked_softmax_backward = _softmax_backward
scaled_aligned_causal_masked_softmax_backward = _softmax_backward


def convert_thd_to_bshd(x: Tensor, bounds: Tensor, batch: int, length: int) -> Tensor:
    """[t, n, d] -> [b, s, n, d], 0 beyond each sequence's end."""
    padded = x.new_zeros(batch, length, *x.shape[1:])
    for row, (begin, end) in enumerate(_spans(bounds)):
        padded[row, : end - begin] = x[begin:end]
    return padded


def convert_bshd_to_thd(x: Tensor, bounds: Tensor, total: int) -> Tensor:
    """[b, s, n, d] -> [t, n, d]."""
    packed = x.new_zeros(total, *x.shape[2:])
    for row, (begin, end) in enumerate(_spans(bounds)):
        packed[begin:end] = x[row, : end - begin]
    return packed


def _spans(bounds: Tensor) -> list[tuple[int, int]]:
    places = bounds.tolist()
    return list(pairwise(places))


def _angles_of(
    x: Tensor, angles: Tensor, starts: Tensor | None, form: Any, bounds: Tensor | None, size: int, rank: int
) -> Tensor:
    """Angles in the form of `x`, [s, 1, 1, d] or [t, 1, d], of the tokens that this context-parallel rank holds."""
    if starts is not None:
        raise NotImplementedError("fused rotations with start positions are not emulated")

    def of_length(length: int) -> Tensor:
        if size == 1:
            return angles[:length]
        half, whole = length // 2, length * size
        first = angles[rank * half : (rank + 1) * half]
        return torch.cat([first, angles[whole - (rank + 1) * half : whole - rank * half]])

    if form.name == "NVTE_SBHD":
        return of_length(x.shape[0])
    if form.name == "NVTE_THD" and bounds is not None:
        lengths = [(end - begin) // size for begin, end in _spans(bounds)]
        return torch.cat([of_length(length) for length in lengths])[:, 0]
    raise NotImplementedError(f"fused rotations of {form.name} are not emulated")


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    """x·cos + rotate_half(x)·sin in as many of the first dimensions as there are angles; backward: its transpose."""
    width = cosine.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    one, other = (turned * sine).chunk(2, dim=-1) if backward else turned.chunk(2, dim=-1)
    half = torch.cat([other, -one], -1) if backward else torch.cat([-other, one], -1) * sine
    return torch.cat([(turned * cosine + half).to(x.dtype), rest], -1)


def fused_rope_forward(
    x: Tensor,
    angles: Tensor,
    starts: Tensor | None,
    form: Any,
    interleaved: bool,
    bounds: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotates halves of each head by the angles of its token."""
    refuse("fused_rope_forward", interleaved=interleaved)
    mine = _angles_of(x, angles, starts, form, bounds, cp_size, cp_rank)
    return _rotate(x, mine.cos(), mine.sin(), backward=False)


def fused_rope_backward(
    dy: Tensor,
    angles: Tensor,
    starts: Tensor | None,
    form: Any,
    interleaved: bool,
    bounds: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The transpose of the rotation."""
    refuse("fused_rope_backward", interleaved=interleaved)
    mine = _angles_of(dy, angles, starts, form, bounds, cp_size, cp_rank)
    return _rotate(dy, mine.cos(), mine.sin(), backward=True)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together [1], and of each."""
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    """second ← scale · first."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: Tensor) -> None:
    """`multi_tensor_scale` by a factor that is on the device, [1]."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam (mode 0, decay in the gradient) or AdamW (mode 1) on gradients, parameters, first and second moments, and
    where there is a fifth list, main weights in fp32, to which the parameters are then rounded.
    """
    first, second = (1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2))
    for gradient, parameter, mean, square, *main in zip(*lists, strict=True):
        g, p = gradient.float(), (main[0] if main else parameter.float())
        if mode == 0:
            g = g + weight_decay * p
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + eps)
        if mode == 1:
            update = update + weight_decay * p
        updated = p - lr * update
        for kept in main:
            kept.copy_(updated)
        parameter.copy_(updated)
