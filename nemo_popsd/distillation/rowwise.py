"""The arithmetic between the matrix products, as pure functions of one tile of rows on one shard of the vocabulary.

`fusion.py` compiles them; run as they stand they are the reference. They see no process group: what crosses shards is
small vectors for each row, which `closed_form.py` exchanges between the three steps.

    measure      logits of student and target from raw products, and their statistics on this shard
    mix          (JSD) the statistics of the mixture on this shard, from all shards' `measure`
    slope_*      loss and gradient, from all shards' statistics

Legend: R rows of the tile, V true vocabulary of this shard, P shards. s, t are logits divided by the temperature;
S = s − max s and T = t − max t over this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Beyond this log-ratio the student's share of the mixture is below every float's resolution, and exp would overflow.
_LARGEST_LOG_RATIO = 80.0

MEASURES = 8
"""Rows of what `measure` returns: max s, max t, Σe^S, Σe^T, Σe^S·S, Σe^T·T, Σe^S·D, Σe^T·D; D = T less S."""


class Constants(NamedTuple):
    """Numbers of target and divergence as scalar tensors: compiled code need not be built again for other values."""

    inverse_temperature: Tensor
    """1/τ."""
    inside: Tensor
    """1/(τ·c) of the soft cap c, or 1/c where the logits are scaled already."""
    outside: Tensor
    """a_T·c."""
    student: Tensor
    """a_S."""
    weight: Tensor
    """w of the JSD."""


class Coefficients(NamedTuple):
    """Further numbers where the model caps its logits softly, at κ; scalar tensors as in `Constants`."""

    inverse_soft_cap: Tensor
    """1/κ."""
    soft_cap_over_temperature: Tensor
    """κ/τ."""
    base: Tensor
    """a_0."""
    privileged: Tensor
    """a_T."""
    reference: Tensor
    """a_R."""


class Totals(NamedTuple):
    """Statistics over the whole vocabulary [R], the same on every shard."""

    peak_s: Tensor
    peak_t: Tensor
    z_s: Tensor
    z_t: Tensor
    mean_difference: Tensor
    """Σp·D, D = T less S, each shifted by its global maximum."""
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    target_entropy: Tensor


def measure(
    s_RV: Tensor, anchor_RV: Tensor | None, shift_RV: Tensor | None, mean_R: Tensor | None, constants: Constants
) -> Tensor:
    """From raw products to s and t, in place, and to their statistics on this shard.

    s replaces `s_RV`; t replaces `anchor_RV`, or `shift_RV` where there is no anchor.

    Args:
        s_RV: W_s·h.
        anchor_RV: W·anchor, or None.
        shift_RV: W·d, or None.
        mean_R: w̄·d, the mean of W·d over the true vocabulary; goes with `shift_RV`.
        constants: of target and divergence.

    Returns:
        [MEASURES, R].
    """
    s = s_RV * constants.inverse_temperature
    t = s * constants.student
    if shift_RV is not None:
        assert mean_R is not None
        t = t + torch.tanh((shift_RV - mean_R[:, None]) * constants.inside) * constants.outside
    if anchor_RV is not None:
        t = t + anchor_RV * constants.inverse_temperature
    s_RV.copy_(s)
    t_RV = shift_RV if anchor_RV is None else anchor_RV
    assert t_RV is not None
    t_RV.copy_(t)
    return _statistics(s, t)


def measure_capped(
    s_RV: Tensor,
    bend_RV: Tensor,
    base_RV: Tensor | None,
    privileged_RV: Tensor | None,
    reference_RV: Tensor | None,
    mean_R: Tensor | None,
    coefficients: Coefficients,
    constants: Constants,
) -> Tensor:
    """As `measure`, for a model whose logits are κ·tanh(W·h/κ): not linear in h, so each branch has its own product.

    s replaces `s_RV`; t replaces the first of the three that is given; the derivative of the student's soft cap,
    1 − tanh²(W_s·h/κ), replaces `bend_RV`.

    Args:
        s_RV: W_s·h.
        bend_RV: filled here.
        base_RV: W·h_0, or None where its coefficient is 0.
        privileged_RV: W·h_T, or None.
        reference_RV: W·h_ref, or None.
        mean_R: mean over the true vocabulary of the difference of the capped logits of T and ref, divided by τ; None
            where the target has no cap of its own.
        coefficients: of the target and of the soft cap.
        constants: of target and divergence.

    Returns:
        [MEASURES, R].
    """

    def capped(product_RV: Tensor) -> Tensor:
        return torch.tanh(product_RV * coefficients.inverse_soft_cap) * coefficients.soft_cap_over_temperature

    bent = torch.tanh(s_RV * coefficients.inverse_soft_cap)
    s = bent * coefficients.soft_cap_over_temperature
    t = s * constants.student
    if mean_R is not None:
        assert privileged_RV is not None
        assert reference_RV is not None
        difference = capped(privileged_RV) - capped(reference_RV)
        t = t + torch.tanh((difference - mean_R[:, None]) * constants.inside) * constants.outside
    else:
        if privileged_RV is not None:
            t = t + capped(privileged_RV) * coefficients.privileged
        if reference_RV is not None:
            t = t + capped(reference_RV) * coefficients.reference
    if base_RV is not None:
        t = t + capped(base_RV) * coefficients.base
    bend_RV.copy_(1 - bent * bent)
    s_RV.copy_(s)
    t_RV = next(x for x in (base_RV, privileged_RV, reference_RV) if x is not None)
    t_RV.copy_(t)
    return _statistics(s, t)


def capped_difference(privileged_RV: Tensor, reference_RV: Tensor, coefficients: Coefficients) -> Tensor:
    """Sum over this shard of the difference of the capped logits of T and ref, divided by τ: [R]."""
    difference = torch.tanh(privileged_RV * coefficients.inverse_soft_cap)
    difference -= torch.tanh(reference_RV * coefficients.inverse_soft_cap)
    return difference.sum(-1) * coefficients.soft_cap_over_temperature


def _statistics(s: Tensor, t: Tensor) -> Tensor:
    peak_s, peak_t = s.amax(-1), t.amax(-1)
    s, t = s - peak_s[:, None], t - peak_t[:, None]
    exp_s, exp_t = s.exp(), t.exp()
    difference = t - s
    return torch.stack(
        (
            peak_s,
            peak_t,
            exp_s.sum(-1),
            exp_t.sum(-1),
            (exp_s * s).sum(-1),
            (exp_t * t).sum(-1),
            (exp_s * difference).sum(-1),
            (exp_t * difference).sum(-1),
        )
    )


def total(measures_PKR: Tensor) -> Totals:
    """Statistics over the whole vocabulary from those of the shards [P, MEASURES, R].

    A shard's sums are taken relative to its own maxima; with a = its max less the greatest, e^a·Σ moves them to the
    greatest. Where s = t on every shard both KLs are exactly 0.
    """
    max_s, max_t, z_s, z_t, s_s, t_t, s_difference, t_difference = measures_PKR.unbind(1)
    peak_s, peak_t = max_s.amax(0), max_t.amax(0)
    # A shard of nothing but padding has maximum −∞: it is left out, where 0·∞ would make NaN.
    away_s = torch.where(max_s == -torch.inf, 0.0, max_s - peak_s)
    away_t = torch.where(max_t == -torch.inf, 0.0, max_t - peak_t)
    share_s, share_t = away_s.exp(), away_t.exp()
    apart = away_t - away_s
    total_z_s, total_z_t = (share_s * z_s).sum(0), (share_t * z_t).sum(0)
    log_z_s, log_z_t = total_z_s.log(), total_z_t.log()
    offset = log_z_t - log_z_s
    mean_difference = (share_s * (s_difference + apart * z_s)).sum(0) / total_z_s
    return Totals(
        peak_s=peak_s,
        peak_t=peak_t,
        z_s=total_z_s,
        z_t=total_z_t,
        mean_difference=mean_difference,
        forward_kl=(share_t * (t_difference + apart * z_t)).sum(0) / total_z_t - offset,
        reverse_kl=offset - mean_difference,
        student_entropy=log_z_s - (share_s * (s_s + away_s * z_s)).sum(0) / total_z_s,
        target_entropy=log_z_t - (share_t * (t_t + away_t * z_t)).sum(0) / total_z_t,
    )


def watched(totals: Totals) -> Tensor:
    """[4, R]: forward KL, reverse KL, student entropy, target entropy."""
    return torch.stack((totals.forward_kl, totals.reverse_kl, totals.student_entropy, totals.target_entropy))


def mix(s_RV: Tensor, t_RV: Tensor, measures_PKR: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """The JSD's mixture m = w·q + (1−w)·p. p replaces `s_RV`, and log(m/p) replaces `t_RV`.

    log(m/p) = log1p(w·expm1(r)) with r = log q − log p: exactly 0 where q = p.

    Returns:
        [4, R], what `watched` gives; and [2, R], KL(q‖m) and KL(p‖m) on this shard.
    """
    totals = total(measures_PKR)
    s, t = s_RV - totals.peak_s[:, None], t_RV - totals.peak_t[:, None]
    offset = totals.z_t.log() - totals.z_s.log()
    ratio = (t - s - offset[:, None]).clamp(max=_LARGEST_LOG_RATIO)
    log_m_over_p = torch.log1p(torch.expm1(ratio) * constants.weight)
    p = s.exp() / totals.z_s[:, None]
    q = t.exp() / totals.z_t[:, None]
    s_RV.copy_(p)
    t_RV.copy_(log_m_over_p)
    parts = torch.stack(((q * (ratio - log_m_over_p)).sum(-1), -(p * log_m_over_p).sum(-1)))
    return watched(totals), parts


def jsd_grad(
    p_RV: Tensor,
    log_m_over_p_RV: Tensor,
    kl_pm_R: Tensor,
    weights_R: Tensor,
    out_RV: Tensor | None,
    constants: Constants,
) -> None:
    """Gradient of weights·JSD: weights·(1−w)·p·(−log(m/p) − KL(p‖m)), into `out_RV`, or `p_RV` where that is None.

    Not given as the same memory twice: compiled code may not see that two arguments overlap.
    """
    factor = weights_R * (constants.weight - 1)
    (p_RV if out_RV is None else out_RV).copy_(p_RV * factor[:, None] * (log_m_over_p_RV + kl_pm_R[:, None]))


def slope_forward(s_RV: Tensor, t_RV: Tensor, measures_PKR: Tensor, weights_R: Tensor, out_RV: Tensor | None) -> Tensor:
    """Gradient of weights·KL(q‖p): weights·(p − q), into `out_RV`, or `s_RV` where that is None. Returns `watched`."""
    totals = total(measures_PKR)
    p = (s_RV - totals.peak_s[:, None]).exp() / totals.z_s[:, None]
    q = (t_RV - totals.peak_t[:, None]).exp() / totals.z_t[:, None]
    (s_RV if out_RV is None else out_RV).copy_((p - q) * weights_R[:, None])
    return watched(totals)


def slope_reverse(s_RV: Tensor, t_RV: Tensor, measures_PKR: Tensor, weights_R: Tensor, out_RV: Tensor | None) -> Tensor:
    """Gradient of weights·KL(p‖q): weights·p·(log p − log q − KL), into `out_RV`, or `s_RV` where that is None.

    The normalisers cancel in the bracket. Returns `watched`.
    """
    totals = total(measures_PKR)
    s, t = s_RV - totals.peak_s[:, None], t_RV - totals.peak_t[:, None]
    p = s.exp() / totals.z_s[:, None]
    (s_RV if out_RV is None else out_RV).copy_(p * (totals.mean_difference[:, None] - (t - s)) * weights_R[:, None])
    return watched(totals)
