"""The functions of `rowwise.py` as the loss calls them: compiled by torch.compile into fused kernels, or as they stand.

Between two matrix products nearly everything is bound by memory: fused, a tile of logits is read a few times instead
of a few dozen. Compiled once in a process for each target and divergence (some seconds the first time; inductor's
cache on disk makes later runs quicker); sizes are symbolic, so other numbers of tokens cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_popsd.distillation import rowwise
from nemo_popsd.errors import UserError

logger = logging.getLogger(__name__)

SETTINGS = ("auto", "always", "never")

_SMALLEST_FUSED_VOCABULARY = 8192
"""Entries of a shard from which `auto` compiles: below, a run is over before the compilation has paid for itself."""

_TILE_BYTES = {("cpu", False): 1 << 19, ("cpu", True): 1 << 22, ("cuda", False): 1 << 26, ("cuda", True): 1 << 26}
"""Size of one tile of logits by device and whether fused: a handful of them fits the cache (measured on a CPU)."""


_ALIGNED_ROWS = 8


class Stages(NamedTuple):
    """The functions of `rowwise.py`, under their names there, and the rows of a tile that suit them."""

    measure: Callable[..., Tensor]
    measure_capped: Callable[..., Tensor]
    mix: Callable[..., tuple[Tensor, Tensor]]
    jsd_grad: Callable[..., None]
    slope_forward: Callable[..., Tensor]
    slope_reverse: Callable[..., Tensor]
    fused: bool

    def tile_rows(self, width: int, dtype: torch.dtype, device: torch.device) -> int:
        """Rows of `width` entries that are worked on at a time."""
        size = _TILE_BYTES["cpu" if device.type == "cpu" else "cuda", self.fused]
        rows = max(1, size // max(1, width * dtype.itemsize))
        # Tiles then start where vector loads want them, whatever the width: else compiled GPU code copies its inputs.
        return rows if rows < _ALIGNED_ROWS else rows // _ALIGNED_ROWS * _ALIGNED_ROWS


class _Compiled:
    """A function of `rowwise.py`, compiled when first called; as it stands where no compiler works."""

    broken = False
    """Of the whole class: what fails for one function fails for all."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        # One thread compiles: a pool of processes would outlive its use, and a few kernels gain nothing by it.
        self._compiled = torch.compile(function, dynamic=True, fullgraph=True, options={"compile_threads": 1})
        self._worked = False

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        """Calls it. Sizes of 1 would be compiled once more for themselves, so they are not compiled at all."""
        if _Compiled.broken or min(first.shape) < 2:
            return self._function(first, *rest)
        if self._worked:
            return self._compiled(first, *rest)
        try:
            result = self._compiled(first, *rest)
        except Exception as error:
            # Compilation fails before anything has been computed: the arguments are as they were.
            logger.warning("the loss is not fused, which costs time: torch.compile failed: %s", _first_line(error))
            _Compiled.broken = True
            return self._function(first, *rest)
        self._worked = True
        return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


_FUNCTIONS = ("measure", "measure_capped", "mix", "jsd_grad", "slope_forward", "slope_reverse")
_eager = Stages(fused=False, **{name: getattr(rowwise, name) for name in _FUNCTIONS})
_fused: Stages | None = None


def choose_stages(setting: str, width: int, dtype: torch.dtype) -> Stages:
    """The functions to use for a shard of `width` entries.

    Args:
        setting: `auto` fuses in fp32 from 8,192 entries of a shard on; `always` always; `never` never.
        width: true vocabulary entries of this shard.
        dtype: of the statistics. In float64, which is there to check others, `auto` does not fuse.

    Raises:
        UserError: unknown setting.
    """
    if setting not in SETTINGS:
        raise UserError("loss", got=f"fused={setting!r}", need=f"one of {', '.join(SETTINGS)}", fix="set fused")
    large = width >= _SMALLEST_FUSED_VOCABULARY and dtype == torch.float32
    if setting == "never" or _Compiled.broken or (setting == "auto" and not large):
        return _eager
    global _fused
    if _fused is None:
        _fused = Stages(fused=True, **{name: _Compiled(getattr(rowwise, name)) for name in _FUNCTIONS})
    return _fused
