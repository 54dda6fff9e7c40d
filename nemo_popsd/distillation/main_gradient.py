"""The buffer in which a trainer accumulates the gradient of the output matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MainGradient:
    """Where a trainer keeps the gradient of the output matrix, so that no second tensor of its size is needed.

    A gradient computed in the forward pass must be scaled there: the trainer states what backward will multiply the
    loss by, and backward raises where it does not. One forward pass, then one backward pass.
    """

    buffer: Tensor
    """[V_pad/tp, H] in fp32 (float64 for float64); the gradient is added to it in the forward pass."""

    upstream: float
    """Derivative of what backward is called on with respect to the loss's `total`."""

    placeholder: bool = False
    """Whether autograd must still pass zeros of the matrix's size to the parameter's hooks, which require some
    gradient (Megatron's, where it overlaps the reduction of gradients with the backward pass). Otherwise the parameter
    gets none from the loss."""
