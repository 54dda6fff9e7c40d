"""How much of the teacher's signal comes from the reference alone (eq. 4), on a sample of a chunk's tokens.

    Δ_total = log π_T − log π_θ  =  Δ_ref + Δ_it
    Δ_ref   = log π_ref − log π_θ      reference-induced, not transferable
    Δ_it    = log π_T − log π_ref      question-conditioned, transferable

Norms and cosines over the full vocabulary need the log-probabilities of T and of ref, each with a log-sum-exp of its
own. The loss has W·h, W·d with d = h_T − h_ref, and W·h_0: of the three none is W·h_T or W·h_ref, and log Σexp is not
linear, so no combination of what the chunk has gives them. One more vector for each sampled token is what it takes
(h_T; z_ref is z_T − W·d then), two where the target has no shift. Their rows join the chunk's product: no product of
their own, no collective of their own.

Legend: D sampled tokens of the chunk, V true vocabulary entries of this rank, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagnosedTokens:
    """Tokens on which to decompose, with the states that the decomposition needs; D of N."""

    index: Tensor
    """[D] int64, ascending: which tokens."""
    privileged: Tensor
    """[D, H] h_T."""
    reference: Tensor
    """[D, H] h_ref."""


class DecompositionStatistics(NamedTuple):
    """Per sampled token [D], over the full true vocabulary; the figures of the paper's analysis.

    A quotient whose denominator is exactly 0 (student and teacher agree) is NaN: average with `torch.nanmean`.
    """

    norm_ratio: Tensor
    """‖Δ_ref‖ / ‖Δ_total‖: above 1 where the reference-induced part dominates."""

    cosine_question: Tensor
    """cos(Δ_total, Δ_it), of the question-conditioned part."""

    cosine_reference: Tensor
    """cos(Δ_total, Δ_ref), of the reference-induced part."""


SAMPLE_MEASURES = 14
"""Rows of what `measure_sample` returns."""


def measure_sample(student_DV: Tensor, privileged_DV: Tensor, reference_DV: Tensor) -> Tensor:
    """Statistics of logits (at the loss's temperature) on this shard: [SAMPLE_MEASURES, D].

    Maxima and sums of exponentials of the three; then sums, and sums of products, of the differences of the logits,
    each less its row's maximum on this shard, which keeps them small: total, induced, question.
    """
    logits = (student_DV, privileged_DV, reference_DV)
    if student_DV.shape[1] == 0:
        nothing = student_DV.new_zeros(SAMPLE_MEASURES, student_DV.shape[0])
        nothing[:3] = -torch.inf
        return nothing
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


def decompose(measures_PMD: Tensor, widths: list[int]) -> Tensor:
    """Norms and products over the whole vocabulary from the shards' measures: [5, D], in their dtype.

    ‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², Δ_total·Δ_it, Δ_total·Δ_ref. Worked out in float64: of [D] numbers only.

    Args:
        measures_PMD: `measure_sample` of every shard.
        widths: true vocabulary entries of every shard.
    """
    m = measures_PMD.double()
    count_P1 = torch.tensor(widths, dtype=m.dtype, device=m.device)[:, None]
    peaks_P3D, sums_P3D = m[:, :3], m[:, 3:6]
    greatest_3D = peaks_P3D.amax(0)
    log_z_3D = greatest_3D + ((peaks_P3D - greatest_3D).exp() * sums_P3D).sum(0).log()
    # What the shard's own shift leaves of each log-probability; a shard without entries has none.
    rest = torch.where(peaks_P3D == -torch.inf, 0.0, peaks_P3D - log_z_3D)
    student, privileged, reference = rest.unbind(1)
    shift = {"total": privileged - student, "induced": reference - student, "question": privileged - reference}
    linear = dict(zip(shift, m[:, 6:9].unbind(1), strict=True))
    pairs = (
        ("total", "total"),
        ("induced", "induced"),
        ("question", "question"),
        ("total", "question"),
        ("total", "induced"),
    )
    # Σ(x + a)(y + b) = Σxy + aΣy + bΣx + nab
    products = [
        quadratic + shift[a] * linear[b] + shift[b] * linear[a] + count_P1 * shift[a] * shift[b]
        for (a, b), quadratic in zip(pairs, m[:, 9:14].unbind(1), strict=True)
    ]
    return torch.stack([product.sum(0) for product in products]).to(measures_PMD.dtype)


def decomposition_statistics(products_5D: Tensor) -> DecompositionStatistics:
    """The figures from what `decompose` gives for all sampled tokens."""
    total, induced, question = products_5D[:3].clamp_min(0).sqrt()
    return DecompositionStatistics(
        norm_ratio=_quotient(induced, total),
        cosine_question=_quotient(products_5D[3], total * question),
        cosine_reference=_quotient(products_5D[4], total * induced),
    )


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.nan, numerator / denominator)
