"""The three divergences of the student p = π_θ from the target q = P, with autograd.

    forward_kl:  KL(q ‖ p)
    reverse_kl:  KL(p ‖ q)
    jsd:         w·KL(q ‖ m) + (1−w)·KL(p ‖ m),  m = w·q + (1−w)·p

With a clip, each vocabulary entry's term of the sum is at most `clip` (official OPSD's later recipe).

The JSD is eq. 18 of the paper. The default weight 0.5 is ours; the paper does not state it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.parallel.collectives import sum_for_replicas

if TYPE_CHECKING:
    from nemo_popsd.distillation.config import DivergenceConfig

logger = logging.getLogger(__name__)

KINDS = ("jsd", "forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Divergence:
    """The divergence that the loss computes.

    Raises:
        UserError: the kind is unknown, the weight is not in (0, 1) (at 0 and 1 the JSD is identically 0), or the clip
            is not above 0.
    """

    kind: str = "jsd"
    """jsd, forward_kl (covers the target) or reverse_kl (seeks its modes)."""

    weight: float = 0.5
    """w of the JSD: the share of the target in the mixture m. The KLs do not use it."""

    clip: float | None = None
    """Largest contribution of one vocabulary entry to the sum (official OPSD's later recipe: 0.05). Negative
    contributions to a KL are not clipped, so a clipped KL may be negative."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError("divergence", got=f"kind={self.kind!r}", need=f"one of {', '.join(KINDS)}", fix="set kind")
        if not 0 < self.weight < 1:
            raise UserError("divergence", got=f"weight={self.weight!r}", need="a number in (0, 1)", fix="set weight")
        if self.clip is not None and not self.clip > 0:
            raise UserError("divergence", got=f"clip={self.clip!r}", need="a number above 0, or None", fix="set clip")

    @property
    def sums_entries(self) -> bool:
        """Whether loss and gradient need sums over the vocabulary that depend on the normalisers."""
        return self.kind == "jsd" or self.clip is not None


def divergence_of_log_probs(
    log_p: Tensor, log_q: Tensor, divergence: Divergence, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """The divergence as defined, differentiable in `log_p`.

    One all-reduce forward (all terms are summed locally first), none backward.

    Args:
        log_p: student's log-probabilities [N, v] of this rank's true vocabulary entries, normalised over the group.
        log_q: target's log-probabilities [N, v], constant.
        divergence: kind, weight and clip.
        tp_group: the group over which the vocabulary is sharded; None for one shard.

    Returns:
        [N], replicated over the group.
    """
    if divergence.kind == "forward_kl":
        terms = log_q.exp() * (log_q - log_p)
    elif divergence.kind == "reverse_kl":
        terms = log_p.exp() * (log_p - log_q)
    else:
        w = divergence.weight
        log_m = torch.logaddexp(log_q + math.log(w), log_p + math.log1p(-w))
        terms = w * log_q.exp() * (log_q - log_m) + (1 - w) * log_p.exp() * (log_p - log_m)
    if divergence.clip is not None:
        terms = terms.clamp(max=divergence.clip)
    return sum_for_replicas(terms.sum(-1), tp_group)


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence that `config` specifies. Logs a warning if its clip may make it negative."""
    if config.clip is not None and config.kind != "jsd":
        logger.warning(
            "distillation.divergence.clip=%g bounds the contributions of vocabulary entries only from above, and those "
            "of a KL may be negative: the loss may become negative, and does not measure the distance from the target",
            config.clip,
        )
    return Divergence(kind=config.kind, weight=config.weight, clip=config.clip)
