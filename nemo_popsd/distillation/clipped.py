"""Kernels for divergences with clipped vocabulary entries, as in official OPSD's later recipe (clip 0.05).

A divergence is a sum over vocabulary entries, D = Σ_v e_v. With a clip it is D = Σ_v min(e_v, clip). The entries of a
KL may be negative, and these are not clipped, so the clipped sum may be negative even if student and target are far
apart. The entries of a JSD are at least 0. With I_v = 1 if e_v <= clip, otherwise 0, and p = π_θ, q = P, the gradient
with respect to the student's logits is h_v − p_v·G:

    forward KL   e = q·(log q − log p)                        h = p − I·q                     G = Σ (1−I)·q
    reverse KL   e = p·(log p − log q)                        h = I·e − (1−I)·p               G = Σ h
    JSD          e = w·q·(log q − log m) + (1−w)·p·(log p − log m)    h = (1−w)·I·p·(log p − log m)   G = Σ h

If no entry is clipped, this is the gradient without a clip; if p = q, it is exactly 0. The clipped sum and G need the
normalisers, so they take one all-reduce of [2, C] after the collective of the statistics, like the JSD without a clip.

The kernels follow the conventions of `closed_form`. Legend: R tokens of a tile, V true vocabulary entries of this
rank, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_popsd.distillation.closed_form import LARGEST_LOG_RATIO, Constants, kl_and_entropy, merge_shards


def forward_kl_entries(s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """Entries of KL(q‖p): p replaces `s_RV`, and h replaces `t_RV`.

    Returns:
        This shard's part of the clipped sum and of G [2, R], and `kl_and_entropy`.
    """
    p, q, ratio, statistics = _distributions(s_RV, t_RV, stats_PKR)
    entries = q * ratio
    is_open = entries <= constants.clip
    loss = entries.minimum(constants.clip).sum(-1)
    clipped_mass = torch.where(is_open, 0.0, q).sum(-1)
    s_RV.copy_(p)
    t_RV.copy_(p - torch.where(is_open, q, 0.0))
    return torch.stack((loss, clipped_mass)), statistics


def reverse_kl_entries(s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """Like `forward_kl_entries`, for KL(p‖q)."""
    p, _, ratio, statistics = _distributions(s_RV, t_RV, stats_PKR)
    entries = -p * ratio
    h = torch.where(entries <= constants.clip, entries, -p)
    parts = torch.stack((entries.minimum(constants.clip).sum(-1), h.sum(-1)))
    s_RV.copy_(p)
    t_RV.copy_(h)
    return parts, statistics


def jsd_entries(s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """Like `forward_kl_entries`, for the JSD."""
    p, q, ratio, statistics = _distributions(s_RV, t_RV, stats_PKR)
    ratio = ratio.clamp(max=LARGEST_LOG_RATIO)
    log_m_over_p = torch.log1p(torch.expm1(ratio) * constants.weight)
    of_student = p * log_m_over_p * (constants.weight - 1)
    entries = constants.weight * q * (ratio - log_m_over_p) + of_student
    h = torch.where(entries <= constants.clip, of_student, 0.0)
    parts = torch.stack((entries.minimum(constants.clip).sum(-1), h.sum(-1)))
    s_RV.copy_(p)
    t_RV.copy_(h)
    return parts, statistics


def clipped_grad(p_RV: Tensor, h_RV: Tensor, sum_R: Tensor, weights_R: Tensor, out_RV: Tensor | None) -> None:
    """Writes weights·(h − p·G) to `out_RV`, or to `p_RV` if that is None; `sum_R` is G of the full vocabulary."""
    (p_RV if out_RV is None else out_RV).copy_((h_RV - p_RV * sum_R[:, None]) * weights_R[:, None])


def _distributions(s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q and log q − log p [R, V], and `kl_and_entropy`."""
    stats = merge_shards(stats_PKR)
    s, t = s_RV - stats.max_s[:, None], t_RV - stats.max_t[:, None]
    offset = stats.z_t.log() - stats.z_s.log()
    p = s.exp() / stats.z_s[:, None]
    q = t.exp() / stats.z_t[:, None]
    return p, q, t - s - offset[:, None], kl_and_entropy(stats)
