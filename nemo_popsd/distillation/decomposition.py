"""The decomposition of the teacher's signal (eq. 4) on a sample of a chunk's tokens, over a sharded vocabulary.

`statistics` declares the statistics as formulas of norms and inner products; this module computes these. They require
the log-probabilities of T and ref over the full vocabulary, each with its own log-sum-exp. The loss computes W·h, W·h_0
and W·d with d = h_T − h_ref. These log-probabilities do not follow from the chunk's products, because none of the
three is W·h_T or W·h_ref, and log Σexp is not linear. One additional vector per sampled token suffices: h_T, since
z_ref = z_T − W·d. If the target has no shift, h_ref is also needed. These vectors are part of the chunk's matrix
product and of its first collective, so the decomposition adds no product and no collective.

Legend: D sampled tokens of the chunk, V true vocabulary entries of this rank, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, SignalProducts, StatisticValues


@dataclass(frozen=True)
class DiagnosedTokens:
    """The D of N tokens on which the signal is decomposed, with their hidden states."""

    index: Tensor
    """Indices of the tokens [D], int64, ascending."""
    privileged: Tensor
    """h_T [D, H]."""
    reference: Tensor
    """h_ref [D, H]."""


SIGNAL_SHARD_STATS = 14
"""Number of statistics that `signal_shard_stats` returns."""

SIGNAL_PRODUCTS = len(SignalProducts._fields)
"""Number of norms and products that `merge_signal_shards` returns."""


def signal_shard_stats(student_DV: Tensor, privileged_DV: Tensor, reference_DV: Tensor) -> Tensor:
    """Statistics of logits (at the loss's temperature) on this shard: [SIGNAL_SHARD_STATS, D].

    In order: the maximum and the sum of exponentials of each of the three logits; the sums of their differences (total,
    reference, question); the sums of products of the differences. Differences are taken of logits minus their maximum
    on this shard, which keeps them small.
    """
    logits = (student_DV, privileged_DV, reference_DV)
    if student_DV.shape[1] == 0:
        empty_stats = student_DV.new_zeros(SIGNAL_SHARD_STATS, student_DV.shape[0])
        empty_stats[:3] = -torch.inf
        return empty_stats
    peaks = [x.amax(-1) for x in logits]
    student, privileged, reference = (x - peak[:, None] for x, peak in zip(logits, peaks, strict=True))
    total, induced, question = privileged - student, reference - student, privileged - reference
    pairs = ((total, total), (induced, induced), (question, question), (total, question), (total, induced))
    return torch.stack(
        [
            *peaks,
            *(x.exp().sum(-1) for x in (student, privileged, reference)),
            *(x.sum(-1) for x in (total, induced, question)),
            *((a * b).sum(-1) for a, b in pairs),
        ]
    )


def merge_signal_shards(stats_PMD: Tensor, widths: list[int]) -> Tensor:
    """‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², ⟨Δ_total, Δ_it⟩, ⟨Δ_total, Δ_ref⟩ over the full vocabulary: [SIGNAL_PRODUCTS, D].

    Computed in float64 on [D] values, and returned in the dtype of the input.

    Args:
        stats_PMD: `signal_shard_stats` of every shard.
        widths: number of true vocabulary entries of every shard.
    """
    m = stats_PMD.double()
    count_P1 = torch.tensor(widths, dtype=m.dtype, device=m.device)[:, None]
    peaks_P3D, sums_P3D = m[:, :3], m[:, 3:6]
    largest_3D = peaks_P3D.amax(0)
    log_z_3D = largest_3D + ((peaks_P3D - largest_3D).exp() * sums_P3D).sum(0).log()
    # A log-probability is the logit minus the shard's maximum, plus this; 0 on a shard without entries.
    rest = torch.where(peaks_P3D == -torch.inf, 0.0, peaks_P3D - log_z_3D)
    student, privileged, reference = rest.unbind(1)
    total, induced, question = range(3)
    shift = (privileged - student, reference - student, privileged - reference)
    linear = m[:, 6:9].unbind(1)
    pairs = ((total, total), (induced, induced), (question, question), (total, question), (total, induced))
    # Σ(x + a)(y + b) = Σxy + aΣy + bΣx + nab
    products = [
        quadratic + shift[a] * linear[b] + shift[b] * linear[a] + count_P1 * shift[a] * shift[b]
        for (a, b), quadratic in zip(pairs, m[:, 9:14].unbind(1), strict=True)
    ]
    return torch.stack([product.sum(0) for product in products]).to(stats_PMD.dtype)


def signal_statistics(products_5D: Tensor) -> StatisticValues:
    """The declared statistics, from squared norms and products in the order of `merge_signal_shards`."""
    products = SignalProducts(*products_5D[:3].clamp_min(0).sqrt(), *products_5D[3:])
    return StatisticValues(
        SIGNAL_STATISTICS, torch.stack([statistic.formula(products) for statistic in SIGNAL_STATISTICS])
    )
