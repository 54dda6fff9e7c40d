"""The buffer in which a trainer accumulates the gradient of the output matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MainGradient:
    """The trainer's gradient buffer of the output matrix, which avoids a second tensor of its size.

    The forward pass computes the gradient and must scale it, so the trainer states the factor by which backward will
    multiply the loss; backward raises if the factor differs. One backward pass follows each forward pass.
    """

    buffer: Tensor
    """[V_pad/tp, H] in fp32 (float64 for float64); the gradient is added to it in the forward pass."""

    upstream: float
    """Derivative, with respect to the loss's `total`, of the scalar on which backward is called."""

    placeholder: bool = False
    """Whether autograd passes zeros of the matrix's size to the parameter. Megatron's hooks require some gradient if it
    overlaps gradient reduction with the backward pass. Otherwise the parameter receives no gradient from the loss."""
