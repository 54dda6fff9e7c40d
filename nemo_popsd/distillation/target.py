"""The two hidden vectors that determine the target distribution of a token (*ours*); targets: `target_families`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_popsd.distillation.target_families import Target


class HiddenPair(NamedTuple):
    """The vectors of size H that determine the target of each token; see `hidden_pair`."""

    anchor: Tensor | None
    """Linear part [N, H]; None if the target has none."""

    shift: Tensor | None
    """h_T - h_ref [N, H] in fp32 (float64 for float64 inputs); None if the target has no cap."""


def hidden_pair(
    target: Target,
    *,
    base: Tensor | None = None,
    privileged: Tensor | None = None,
    reference: Tensor | None = None,
) -> HiddenPair:
    """Reduces the frozen branches' final hidden states to the vectors that the loss needs (*ours*).

    With logits W·h and one frozen W in all frozen branches, log-partition terms are constant per token, so

        with a cap:  log P = W·(a_0·h_0) + a_T·c·tanh((W·d − w̄·d)/c) + const,  d = h_T − h_ref
        without:     log P = W·(a_0·h_0 + a_T·h_T + a_R·h_ref) + const;  for Purified OPSD h_0 + d/β: one vector

    The loss adds a_S·log π_θ. Sums are computed in fp32 (float64 for float64 inputs): rounding the sum once is more
    accurate than subtracting rounded logits. No collective. A vector with coefficient 1 is returned without a copy.

    Args:
        target: target whose vectors are computed.
        base: h_0 [N, H], final hidden state after the last norm. This and the following may be None if their
            coefficient is 0.
        privileged: h_T [N, H].
        reference: h_ref [N, H].

    Returns:
        Anchor and shift, detached.

    Raises:
        ValueError: a hidden state that the target needs is missing.
    """
    h_0 = _needed("base", target.base, base, target)
    h_teacher = _needed("privileged", target.privileged, privileged, target)
    h_reference = _needed("reference", target.reference, reference, target)
    anchor = [] if h_0 is None else [(target.base, h_0)]
    if not target.has_difference:
        anchor += [] if h_teacher is None else [(target.privileged, h_teacher)]
        anchor += [] if h_reference is None else [(target.reference, h_reference)]
        return HiddenPair(_sum(anchor), None)
    # Computed first, even if it is added to the anchor, so that equal teachers leave the base exactly unchanged.
    assert h_teacher is not None
    assert h_reference is not None
    shift = _sum([(1.0, h_teacher), (-1.0, h_reference)])
    assert shift is not None
    if target.uses_shift:
        return HiddenPair(_sum(anchor), shift)
    return HiddenPair(_sum([*anchor, (target.privileged, shift)]), None)


def _needed(name: str, coefficient: float, hidden: Tensor | None, target: Target) -> Tensor | None:
    """The states of a branch, detached; None if its coefficient is 0."""
    if coefficient == 0:
        return None
    if hidden is None:
        raise ValueError(f"the target {target} needs the hidden states of {name}; got None")
    return hidden.detach()


def _sum(terms: list[tuple[float, Tensor]]) -> Tensor | None:
    if not terms:
        return None
    coefficient, first = terms[0]
    if len(terms) == 1 and coefficient == 1:
        return first
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(dtype) * coefficient if coefficient != 1 else first.to(dtype, copy=True)
    for coefficient, hidden in terms[1:]:
        total.add_(hidden.to(dtype), alpha=coefficient)
    return total
