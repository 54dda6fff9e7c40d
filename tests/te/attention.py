"""Transformer Engine's fused attention (cuDNN) in torch, with the functions that context parallelism needs.

Forward returns the log-sum-exp of each query's scores, and backward takes it. Under context parallelism a call has a
part of the keys, and backward takes the log-sum-exp over the full sequence.

Shapes: [s, b, n, d] (sbhd), [b, s, n, d] (bshd) or [t, n, d] (thd) of queries; keys and values with g heads; the
log-sum-exp is [b, n, s, 1], or [t, n, 1] when packed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.te.kernels import refuse

_LAYOUTS = (
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
    "THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
    "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
    "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET"
)
_ONE_FORMAT = 15
"""The first 15 layouts have queries, keys and values in one form."""


def _names(kind: str, names: str) -> Any:
    return enum.IntEnum(kind, {f"NVTE_{name}": number for number, name in enumerate(names.split())})


QKVLayout = _names("NVTE_QKV_Layout", _LAYOUTS)
QKVFormat = _names("NVTE_QKV_Format", "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD BHSD QKV_Format_NOT_SET")
Bias = _names("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
Mask = _names(
    "NVTE_Mask_Type",
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
Softmax = _names("NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX")
Backend = _names("NVTE_Fused_Attn_Backend", "No_Backend F16_max512_seqlen F16_arbitrary_seqlen FP8")


def get_fused_attn_backend(*arguments: Any, **options: Any) -> Any:
    """The backend that is emulated."""
    return Backend.NVTE_F16_arbitrary_seqlen


def form_of(layout: Any) -> str:
    """sbhd, bshd or thd."""
    if layout >= _ONE_FORMAT:
        raise NotImplementedError(f"fused attention of {layout.name} is not emulated")
    return {"S": "sbhd", "B": "bshd", "T": "thd"}[layout.name.removeprefix("NVTE_")[0]]


def _sequences(
    form: str, mask: Any, bounds: Tensor, padded: Tensor | None, queries: bool, tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Views [b, s, n, d] of parts of `tensors` in which all sequences have one length."""
    lengths = torch.diff(bounds).tolist()
    if form == "thd":
        begins = (bounds if padded is None else padded)[:-1].tolist()
        for begin, length in zip(begins, lengths, strict=True):
            yield tuple(x[None, begin : begin + length] for x in tensors)
        return
    views = [x.transpose(0, 1) if form == "sbhd" else x for x in tensors]
    if "PADDING" not in mask.name or all(length == views[0].shape[1] for length in lengths):
        yield tuple(views)
        return
    for row, length in enumerate(lengths):
        yield tuple(x[row : row + 1, :length] for x in views)


def _hidden(mask: Any, window: Sequence[int], bottom_right: bool, queries: int, keys: int) -> Tensor | None:
    """Mask of the keys to which each query does not attend, [s, k]; None if it attends to all."""
    left, right = window
    causal = "CAUSAL" in mask.name
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    offset = keys - queries if bottom_right else 0
    if causal and not bottom_right and queries != keys:
        raise NotImplementedError("causal attention with different numbers of queries and keys is not emulated")
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)[None]
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return hidden


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """[b, s, n, d], [b, k, g, d] -> [b, n, s, k] in fp32."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bsnd,bknd->bnsk", q.float(), k.float()) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: Sequence[int],
    bottom_right: bool,
    bounds_q: Tensor,
    bounds_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: Any,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    page_table_k: Any,
    page_table_v: Any,
    s_quantizer: Any,
    o_quantizer: Any,
    bias: Any,
    softmax_offset: Any,
    generator: Any,
    rng_elements: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[Tensor]:
    """Attended values, the log-sum-exp, and the state of a generator that is not used."""
    refuse(
        "fused_attn_fwd",
        dropout=is_training and dropout,
        bias_type=bias_type,
        softmax_type=softmax_type,
        paged=page_table_k is not None,
        quantizer=s_quantizer or o_quantizer,
        return_max_logit=return_max_logit,
    )
    form = form_of(layout)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    packed = form == "thd"
    size = q.shape[0] if form != "sbhd" else q.shape[1]
    length = q.shape[0] if form == "sbhd" else q.shape[1]
    lse = torch.zeros((q.shape[0], q.shape[1], 1) if packed else (size, q.shape[2], length, 1), dtype=torch.float32)
    lse_bsn = lse if packed else lse.transpose(1, 2)
    form_lse = "thd" if packed else "bshd"
    for (q_, out_), (k_, v_), (lse_,) in zip(
        _sequences(form, mask, bounds_q, padded_q, True, (q, out)),
        _sequences(form, mask, bounds_kv, padded_kv, False, (k, v)),
        _sequences(form_lse, mask, bounds_q, padded_q, True, (lse_bsn,)),
        strict=True,
    ):
        scores = _scores(q_, k_, scale, _hidden(mask, window, bottom_right, q_.shape[1], k_.shape[1]))
        lse_.copy_(torch.logsumexp(scores, -1, keepdim=True).transpose(1, 2))
        values = v_.repeat_interleave(q_.shape[2] // v_.shape[2], dim=2)
        out_.copy_(torch.einsum("bnsk,bknd->bsnd", torch.softmax(scores, -1), values.float()))
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: Sequence[int],
    bottom_right: bool,
    deterministic: bool,
    bounds_q: Tensor,
    bounds_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    fake_dtype: Any,
    dqkv_dtype: Any,
    saved: Sequence[Tensor],
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    cuda_graph: bool,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values; `saved` begins with the log-sum-exp over all keys."""
    refuse("fused_attn_bwd", dropout=dropout, bias_type=bias_type, quantizer=s_quantizer or dp_quantizer)
    form = form_of(layout)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = saved[0]
    lse_bsn, form_lse = (lse, "thd") if form == "thd" else (lse.transpose(1, 2), "bshd")
    for (q_, out_, dout_, dq_), (k_, v_, dk_, dv_), (lse_,) in zip(
        _sequences(form, mask, bounds_q, padded_q, True, (q, out, dout, dq)),
        _sequences(form, mask, bounds_kv, padded_kv, False, (k, v, dk, dv)),
        _sequences(form_lse, mask, bounds_q, padded_q, True, (lse_bsn,)),
        strict=True,
    ):
        times = q_.shape[2] // k_.shape[2]
        scores = _scores(q_, k_, scale, _hidden(mask, window, bottom_right, q_.shape[1], k_.shape[1]))
        weights = torch.exp(scores - lse_.transpose(1, 2))
        upstream = dout_.float()
        keys, values = (x.float().repeat_interleave(times, dim=2) for x in (k_, v_))
        through = (upstream * out_.float()).sum(-1).transpose(1, 2)[..., None]  # [b, n, s, 1]
        dscores = weights * (torch.einsum("bsnd,bknd->bnsk", upstream, values) - through) * scale
        dq_.copy_(torch.einsum("bnsk,bknd->bsnd", dscores, keys))
        dk_.copy_(torch.einsum("bnsk,bsnd->bknd", dscores, q_.float()).unflatten(2, (-1, times)).sum(3))
        dv_.copy_(torch.einsum("bnsk,bsnd->bknd", weights, upstream).unflatten(2, (-1, times)).sum(3))
    return [dq, dk, dv, None, None]


def _halves(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Places in a packed tensor of all sequences' first halves, and of their second ones."""
    places = bounds.tolist()
    spans = [(begin, (begin + end) // 2, end) for begin, end in pairwise(places)]
    return (
        torch.cat([torch.arange(begin, middle) for begin, middle, _ in spans]),
        torch.cat([torch.arange(middle, end) for _, middle, end in spans]),
    )


def rows_of(bounds: Tensor, second_half: bool) -> Tensor:
    """Places in a packed tensor of all tokens, or of all sequences' second halves."""
    return _halves(bounds)[1] if second_half else torch.arange(int(bounds[-1]))


def thd_read_half_tensor(x: Tensor, bounds: Tensor, half: int) -> Tensor:
    """The first (0) or second (1) halves of all sequences of [t, n, d]."""
    return x[_halves(bounds)[half]]


def _packed(kernel: str, in_packed_format: bool) -> None:
    refuse(kernel, unpacked_log_sum_exp=not in_packed_format)


def thd_second_half_lse_correction(total: Tensor, part: Tensor, bounds: Tensor, packed: bool) -> None:
    """Adds `part` [n, t/2] to the second halves of `total` [n, t], both logarithms of sums."""
    _packed("thd_second_half_lse_correction", packed)
    second = _halves(bounds)[1]
    total[:, second] = torch.logaddexp(total[:, second], part[:, : len(second)])


def thd_read_second_half_lse(lse: Tensor, bounds: Tensor, packed: bool, length: int) -> Tensor:
    """The second halves of [n, t], in `length` columns."""
    _packed("thd_read_second_half_lse", packed)
    second = _halves(bounds)[1]
    read = lse.new_zeros(lse.shape[0], length)
    read[:, : len(second)] = lse[:, second]
    return read


def thd_out_correction(
    out: Tensor, part: Tensor, lse: Tensor, lse_part: Tensor, bounds: Tensor, second_half: bool, packed: bool
) -> None:
    """Adds what a part of the keys contributes, weighted by its share of the sum; [t, n, d] and [n, t]."""
    _packed("thd_out_correction", packed)
    rows = rows_of(bounds, second_half)
    share = torch.exp(lse_part[:, : len(rows)] - lse[:, rows]).t()[..., None]
    flat = out.view(-1, *part.shape[-2:])
    flat[rows] += (part[: len(rows)] * share).to(out.dtype)


def thd_grad_correction(total: Tensor, part: Tensor, bounds: Tensor, first: str, second: str) -> None:
    """Adds or copies `part` into the first or second halves of `total`, or leaves them."""
    rows = dict(zip(("first", "second"), _halves(bounds), strict=True))
    whole = first != "none" and second != "none"
    for half, how in (("first", first), ("second", second)):
        value = part[rows[half]] if whole else part[: len(rows[half])]
        if how == "add":
            total[rows[half]] += value
        elif how == "copy":
            total[rows[half]] = value
