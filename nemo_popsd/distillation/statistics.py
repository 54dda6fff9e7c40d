"""Per-token statistics of the loss, which fall out of its own arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStatistics(NamedTuple):
    """Per token [N], detached, in nats, whichever divergence is the loss; at the temperature of the target."""

    forward_kl: Tensor
    """KL(q ‖ p), target to student."""

    reverse_kl: Tensor
    """KL(p ‖ q), student to target."""

    student_entropy: Tensor
    """Entropy of p: Σ p·log(1/p)."""

    target_entropy: Tensor
    """Entropy of q: Σ q·log(1/q)."""
