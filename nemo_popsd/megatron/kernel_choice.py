"""Attention kernels by device, without importing torch, for `nemo_popsd.megatron.kernels` and the planner."""

from __future__ import annotations

import math

_CACHE_STEP = 256
_WIDEST_FLASH_HEAD = 256

PACKED_TAKES_GROUPS = False
"""Whether the plan assumes that torch's kernel for packed sequences accepts fewer key-value heads than query heads.
Torch 2.13 does; with it a run needs less memory than planned."""


def takes_groups(device_type: str, *, half: bool, masked: bool) -> bool:
    """Whether torch's fused attention accepts fewer key-value heads than query heads.

    Args:
        device_type: `cpu` or the type of a GPU.
        half: whether elements have 16 bits.
        masked: whether a mask is given; plain causal attention needs none.
    """
    return device_type == "cpu" or (half and not masked)


def takes_packed(device_type: str, *, half: bool, width: int) -> bool:
    """Whether FlashAttention computes packed sequences with heads of `width`; see `takes_groups`."""
    return device_type != "cpu" and half and width <= _WIDEST_FLASH_HEAD and width % 8 == 0


def cache_positions(capacity: int, device_type: str) -> int:
    """Positions to allocate per slot for `capacity` in use: on a GPU a multiple of 256, so that strides repeat."""
    return capacity if device_type == "cpu" else math.ceil(capacity / _CACHE_STEP) * _CACHE_STEP
