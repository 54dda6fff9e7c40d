"""FP8 emulated on any device: inputs and weights of linears rounded to e4m3, as the recipes of `fp8.recipe` scale them.

The rounded values are held in the model's precision, in which the product is computed: bf16 adds an error of at most
2^-9 of each value where a scale is no power of two, beside 2^-4 of e4m3. Tensor-parallel ranks scale their own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""
_CALLS = 16
"""Calls whose largest values scale the next one under delayed scaling."""

Rounding: TypeAlias = Callable[[Tensor], Tensor]


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """`x` rounded to e4m3 with the scale at which `largest`, which broadcasts to its shape, is 448; fp32."""
    scale = LARGEST / torch.where(largest > 0, largest, LARGEST).float()
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale


def per_tensor(x: Tensor) -> Tensor:
    """Scaled by the largest value of the tensor itself; fp32."""
    return rounded(x, x.abs().max())


def per_block(x: Tensor, rows: int, columns: int = 128) -> Tensor:
    """Scaled by blocks of `rows` x `columns` of [..., r, k], by powers of two; fp32."""
    flat = x.reshape(-1, x.shape[-1])
    height, width = flat.shape
    padded = pad(flat.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    power = LARGEST * torch.exp2(torch.ceil(torch.log2(torch.where(largest > 0, largest, LARGEST) / LARGEST)))
    return rounded(blocks, power).view_as(padded)[:height, :width].reshape(x.shape)


@dataclass
class Delayed:
    """Scaled by the largest value of the calls before."""

    history: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` rounded, in fp32; larger values than any before saturate."""
        largest = x.abs().max()
        scale = torch.stack(self.history).max() if self.history else largest
        self.history = [*self.history, largest][-_CALLS:]
        return rounded(x, scale)


ROUNDINGS: Mapping[str, Callable[[], tuple[Rounding, Rounding]]] = MappingProxyType(
    {
        "tensorwise": lambda: (per_tensor, per_tensor),
        "blockwise": lambda: (lambda x: per_block(x, 1), lambda weight: per_block(weight, 128)),
        "delayed": lambda: (Delayed(), per_tensor),
        "mxfp8": lambda: (lambda x: per_block(x, 1, 32), lambda weight: per_block(weight, 1, 32)),
    }
)
"""By `fp8.recipe`: makes the rounding of a linear's inputs and that of its weight."""


@contextmanager
def emulated(linears: Iterable[nn.Module], recipe: str) -> Iterator[None]:
    """Context in which inputs and weights of `linears` are rounded, for forward passes without gradient.

    Args:
        linears: modules with a `weight` [out, in], called with their input first.
        recipe: a key of `ROUNDINGS`.
    """
    with ExitStack() as restore:
        for linear in linears:
            inputs, weights = ROUNDINGS[recipe]()
            weight = linear.weight
            assert isinstance(weight, Tensor)
            restore.callback(setattr, weight, "data", weight.data)
            weight.data = weights(weight.data).to(weight.dtype)
            restore.callback(linear.register_forward_pre_hook(_with(inputs)).remove)
        yield


def _with(inputs: Rounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return (inputs(x).to(x.dtype), *rest)

    return hook
