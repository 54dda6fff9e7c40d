"""Products of hidden states with an output matrix, and the dtype in which statistics are taken of them."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 matrix."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def logits(h_CH: Tensor, w_VH: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """W·h / τ, by one path for student and target: equal inputs give equal bits, hence a loss of exactly 0."""
    logits_CV = product(h_CH.to(w_VH.dtype), w_VH.t(), dtype)
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`: rounded to the inputs' precision first only where the device offers no better."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
