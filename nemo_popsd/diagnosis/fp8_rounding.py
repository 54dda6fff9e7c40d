"""Emulates FP8 on any device: rounds inputs and weights of linear modules to e4m3, scaled as `fp8.recipe` requires.

Rounded values are stored, and products computed, in the model's precision. bf16 adds a relative error of at most 2^-9
if a scale is not a power of two, compared with 2^-4 of e4m3. Tensor-parallel ranks scale their own shards.
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
"""Largest e4m3 value, 448."""
_CALLS = 16
"""Number of previous calls whose largest values determine the scale with delayed scaling."""

Rounding: TypeAlias = Callable[[Tensor], Tensor]


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """`x` rounded to e4m3, in fp32. The scale maps `largest`, which broadcasts to the shape of `x`, to 448."""
    scale = LARGEST / torch.where(largest > 0, largest, LARGEST).float()
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale


def per_tensor(x: Tensor) -> Tensor:
    """`x` rounded with a scale from the largest value of the tensor; fp32."""
    return rounded(x, x.abs().max())


def per_block(x: Tensor, rows: int, columns: int = 128) -> Tensor:
    """`x` [..., r, k] rounded with a power-of-two scale per block of `rows` x `columns`; fp32."""
    flat = x.reshape(-1, x.shape[-1])
    height, width = flat.shape
    padded = pad(flat.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    power = LARGEST * torch.exp2(torch.ceil(torch.log2(torch.where(largest > 0, largest, LARGEST) / LARGEST)))
    return rounded(blocks, power).view_as(padded)[:height, :width].reshape(x.shape)


@dataclass
class Delayed:
    """Rounds with a scale from the largest value of previous calls."""

    history: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` rounded, in fp32; values larger than all previous ones saturate."""
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
"""Factories by `fp8.recipe`, which return the rounding of a linear module's inputs and that of its weight."""


@contextmanager
def emulated(linears: Iterable[nn.Module], recipe: str) -> Iterator[None]:
    """A context in which inputs and weights of `linears` are rounded, for forward passes without gradient.

    Args:
        linears: modules with a `weight` [out, in] whose first argument is the input.
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
