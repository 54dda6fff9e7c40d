"""The kernels of `closed_form.py`, fused by torch.compile or uncompiled.

The arithmetic between two matrix products is limited by memory bandwidth: a fused kernel reads a tile of logits a few
times, uncompiled code a few dozen times. Each process compiles a kernel once per target and divergence (a few seconds
the first time; inductor's disk cache makes later runs faster). Sizes are symbolic, so a new number of tokens does not
trigger a recompilation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nemo_popsd.distillation import clipped, closed_form
from nemo_popsd.distillation.closed_form import Kernels
from nemo_popsd.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SETTINGS = ("auto", "always", "never")

_SMALLEST_FUSED_VOCABULARY = 8192
"""Minimum entries of a shard for which `auto` compiles; below it, compilation takes longer than it saves in a run."""

TILE_BYTES = {("cpu", False): 1 << 19, ("cpu", True): 1 << 22, ("cuda", False): 1 << 26, ("cuda", True): 1 << 26}
"""Bytes of one tile of logits, by device type and whether kernels are fused. Several tiles fit in a CPU's cache."""

_ALIGNED_TOKENS = 8


def _tile_tokens(fused: bool, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of tokens with `width` entries each that one kernel call processes."""
    size = TILE_BYTES["cpu" if device.type == "cpu" else "cuda", fused]
    tokens = max(1, size // max(1, width * dtype.itemsize))
    # Tiles start at multiples that are aligned for vector loads at any width; compiled GPU code copies other inputs.
    return tokens if tokens < _ALIGNED_TOKENS else tokens // _ALIGNED_TOKENS * _ALIGNED_TOKENS


class _Compiled(Generic[Result]):
    """A kernel that is compiled when first called, and runs uncompiled if compilation fails."""

    broken = False
    """Whether a compilation failed. Shared by all kernels, since compilation would fail for each of them."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self._function = function
        # One compile thread: a process pool would outlive the compilation, and a few kernels do not need one.
        self._compiled = torch.compile(function, dynamic=True, fullgraph=True, options={"compile_threads": 1})
        self._worked = False

    def __call__(self, first: Tensor, *rest: object) -> Result:
        """Calls the kernel. It runs uncompiled if a size is 1, since torch would compile a separate variant for it."""
        if _Compiled.broken or min(first.shape) < 2:
            return self._function(first, *rest)
        if self._worked:
            return self._compiled(first, *rest)
        try:
            result = self._compiled(first, *rest)
        except Exception as error:
            # Compilation fails before any computation, so the arguments are unchanged.
            logger.warning("torch.compile failed, so the loss runs unfused and is slower: %s", _first_line(error))
            _Compiled.broken = True
            return self._function(first, *rest)
        self._worked = True
        return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _Wrap(Protocol):
    def __call__(self, function: Callable[..., Result], /) -> Callable[..., Result]: ...


def _uncompiled(function: Callable[..., Result]) -> Callable[..., Result]:
    return function


def _kernels(wrap: _Wrap, *, fused: bool) -> Kernels:
    return Kernels(
        shard_stats=wrap(closed_form.shard_stats),
        jsd_mixture=wrap(closed_form.jsd_mixture),
        jsd_grad=wrap(closed_form.jsd_grad),
        forward_kl_grad=wrap(closed_form.forward_kl_grad),
        reverse_kl_grad=wrap(closed_form.reverse_kl_grad),
        clipped_entries={
            "jsd": wrap(clipped.jsd_entries),
            "forward_kl": wrap(clipped.forward_kl_entries),
            "reverse_kl": wrap(clipped.reverse_kl_entries),
        },
        clipped_grad=wrap(clipped.clipped_grad),
        fused=fused,
        tile_tokens=partial(_tile_tokens, fused),
    )


_eager = _kernels(_uncompiled, fused=False)
_fused: Kernels | None = None


def choose_kernels(setting: str, width: int, dtype: torch.dtype) -> Kernels:
    """The kernels for a shard with `width` entries.

    Args:
        setting: `always`, `never`, or `auto`, which fuses in fp32 for shards with at least 8,192 entries.
        width: number of true vocabulary entries of this shard.
        dtype: data type of the statistics. `auto` does not fuse float64, which only serves to check other precisions.

    Raises:
        UserError: `setting` is unknown.
    """
    if setting not in SETTINGS:
        raise UserError("loss", got=f"fused={setting!r}", need=f"one of {', '.join(SETTINGS)}", fix="set fused")
    large = width >= _SMALLEST_FUSED_VOCABULARY and dtype == torch.float32
    if setting == "never" or _Compiled.broken or (setting == "auto" and not large):
        return _eager
    global _fused
    if _fused is None:
        _fused = _kernels(_Compiled, fused=True)
    return _fused
