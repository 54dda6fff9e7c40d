"""Attention kernels, which depend on the device and the installed torch. Results differ only by rounding.

Shapes: s sequence, b batch, t packed tokens, n query heads and g key-value heads of this tensor-parallel rank, d head
dimension.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from nemo_popsd.megatron.kernel_choice import takes_groups, takes_packed

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of full sequences through torch's fused kernels: [b, n, s, d], [b, g, s, d], [b, g, s, d].

    On a GPU, FlashAttention (bf16, no mask) supports grouped heads. The memory-efficient kernel, which supports fp32
    and masks, does not: for it keys and values are repeated, because torch's fallback would store all scores.

    Args:
        query: queries of all heads.
        key: keys of the key-value heads.
        value: values, shaped like `key`.
        mask: the keys to which each query attends, a bool mask or a `CausalBias`; None for causal attention.
        scale: factor of the scores.

    Returns:
        [b, n, s, d].
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, mask):
        key, value = (_for_each_query_head(x, query) for x in (key, value))
        grouped = False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def suffix_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Attention of the last s tokens of sequences of k: [b, n, s, d], [b, g, k, d], [b, g, k, d] -> [b, n, s, d].

    Each query attends to the keys up to its own position. On a GPU torch's fused kernels compute this without a mask.
    On a CPU they need a mask, which wastes little work if s is small compared with k; otherwise the queries are padded
    with zeros for the earlier tokens, and the results of these are dropped.
    """
    length, keys = query.shape[2], key.shape[2]
    earlier = keys - length
    if earlier == 0:
        return causal_attention(query, key, value, mask=None, scale=scale)
    if query.device.type == "cpu" and 2 * earlier <= length:
        padded = torch.nn.functional.pad(query, (0, 0, earlier, 0))
        return causal_attention(padded, key, value, mask=None, scale=scale)[:, :, earlier:]
    # The memory-efficient kernel, for fp32 on a GPU, supports the `CausalBias`, but not grouped heads.
    return causal_attention(query, key, value, mask=causal_lower_right(length, keys), scale=scale)


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's fused kernel for these inputs supports fewer key-value heads than query heads."""
    masked = mask is not None and not isinstance(mask, CausalBias)
    return takes_groups(query.device.type, half=query.dtype in _FLASH_DTYPES, masked=masked)


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, heads in dimension 1, repeated for the query heads that share them."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def packed_kernel(query: Tensor, scale: float, window: int | None) -> Callable[..., Tensor] | None:
    """PyTorch's attention over packed sequences, if it computes the same as `causal_attention` for each sequence.

    Args:
        query: [t, n, d].
        scale: factor of the scores.
        window: number of tokens that a token attends to, including itself; None for all earlier ones.

    Returns:
        A function that maps query, key and value ([t, n, d], [t, g, d], [t, g, d]), the bounds of the sequences
        [sequences + 1] int32 and the longest length to [t, n, d]. None if attention must run for one sequence at a
        time: on a CPU, in fp32, with a head size that FlashAttention does not support, or with a torch without this
        function.
    """
    width = query.shape[-1]
    if not takes_packed(query.device.type, half=query.dtype in _FLASH_DTYPES, width=width):
        return None
    return _variable_lengths(scale, window, width**-0.5)


@cache
def _variable_lengths(scale: float, window: int | None, default_scale: float) -> Callable[..., Tensor] | None:
    """`torch.nn.attention.varlen.varlen_attn` (torch 2.10 and newer), whose parameters differ between versions."""
    try:
        varlen_attn: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif "is_causal" in known and window is None:
        options["is_causal"] = True
    else:
        return None
    if "scale" in known:
        options["scale"] = scale
    elif scale != default_scale:
        return None
    groups = "enable_gqa" in known
    if groups:
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
        if not groups:
            key, value = (_for_each_query_head(x, query) for x in (key, value))
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)

    return attend


def cached_attention(device: torch.device) -> AbstractContextManager[object]:
    """Context in which attention to the cache uses a kernel that needs no plan for each length and stride.

    On a GPU cuDNN, which torch prefers here, would build a plan for each new shape.
    """
    if device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
