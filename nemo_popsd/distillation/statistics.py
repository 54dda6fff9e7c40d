"""What to watch: per-token statistics of the loss, and the paper's decomposition of the teacher's signal (eq. 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.collectives import reduce_max_, reduce_sum_
from nemo_popsd.distillation.products import logits, statistics_dtype
from nemo_popsd.distillation.vocabulary import row_max, true_width


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


class DecompositionStatistics(NamedTuple):
    """Per token [N], over the full true vocabulary; the figures of the paper's analysis.

    A quotient whose denominator is exactly 0 (student and teacher agree) is NaN: average with `torch.nanmean`.
    """

    norm_ratio: Tensor
    """‖Δ_ref‖ / ‖Δ_total‖: above 1 where the reference-induced part dominates."""

    cosine_question: Tensor
    """cos(Δ_total, Δ_it), of the question-conditioned part."""

    cosine_reference: Tensor
    """cos(Δ_total, Δ_ref), of the reference-induced part."""


@torch.no_grad()
def decomposition_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    privileged_hidden: Tensor,
    reference_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 256,
) -> DecompositionStatistics:
    """How much of the teacher's signal on a sample of tokens comes from the reference alone (eq. 4).

        Δ_total = log π_T − log π_θ  =  Δ_ref + Δ_it
        Δ_ref   = log π_ref − log π_θ      reference-induced, not transferable
        Δ_it    = log π_T − log π_ref      question-conditioned, transferable

    Meant for a few hundred tokens now and then: three matrix products. Collectives: 3 for each chunk (MAX on [3, C],
    SUM on [3, C], SUM on [5, C]). Memory: six [C, V_pad/tp] tensors. No gradient.

    Args:
        student_hidden: h [N, H], replicated over the group.
        student_weight: this rank's rows [V_pad/tp, H].
        privileged_hidden: h_T [N, H].
        reference_hidden: h_ref [N, H].
        teacher_weight: this rank's rows [V_pad/tp, H], the frozen matrix of both teachers.
        vocab_size: size of the true vocabulary.
        temperature: that of the target.
        tp_group: the group over which the vocabulary is sharded; None for one shard.
        chunk_tokens: tokens of a chunk.

    Returns:
        [N] each, in fp32 (float64 where `student_weight` is float64), replicated over the group.

    Raises:
        UserError: the shards together are smaller than the vocabulary.
    """
    valid = true_width(student_weight.shape[0], vocab_size, tp_group)
    dtype = statistics_dtype(student_weight)
    branches = (
        (student_hidden, student_weight),
        (privileged_hidden, teacher_weight),
        (reference_hidden, teacher_weight),
    )
    products_5N = student_hidden.new_empty(5, student_hidden.shape[0], dtype=dtype)
    with torch.autocast(student_hidden.device.type, enabled=False):
        for start in range(0, student_hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_3CV = [logits(hidden[chunk], weight[:valid], dtype, temperature) for hidden, weight in branches]
            student_CV, privileged_CV, reference_CV = _log_softmax_(logits_3CV, tp_group)
            total_CV = privileged_CV - student_CV
            question_CV = privileged_CV.sub_(reference_CV)
            induced_CV = reference_CV.sub_(student_CV)
            pairs = (
                (total_CV, total_CV),
                (induced_CV, induced_CV),
                (question_CV, question_CV),
                (total_CV, question_CV),
                (total_CV, induced_CV),
            )
            local = [torch.mul(a, b, out=student_CV).sum(-1) for a, b in pairs]
            products_5N[:, chunk] = reduce_sum_(torch.stack(local), tp_group)
    norms_3N = products_5N[:3].sqrt()
    total_N, induced_N, question_N = norms_3N
    return DecompositionStatistics(
        norm_ratio=_quotient(induced_N, total_N),
        cosine_question=_quotient(products_5N[3], total_N * question_N),
        cosine_reference=_quotient(products_5N[4], total_N * induced_N),
    )


def _log_softmax_(logits: list[Tensor], tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Log-softmax of several [C, V] tensors in place, with two collectives for all of them."""
    peaks = reduce_max_(torch.stack([row_max(x) for x in logits]), tp_group)
    for x, peak in zip(logits, peaks, strict=True):
        x.sub_(peak[:, None])
    totals = reduce_sum_(torch.stack([x.exp().sum(-1) for x in logits]), tp_group)
    return [x.sub_(total.log()[:, None]) for x, total in zip(logits, totals, strict=True)]


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.nan, numerator / denominator)
