"""The divergence of one chunk of tokens with its closed-form gradient, in place on the chunk's logits.

Let s, t be the logits of student and target, each less its row's maximum, Z_s and Z_t the sums of their exponentials,
and r = t − s − (log Z_t − log Z_s) = log q − log p. Then, with respect to the student's logits,

    forward KL(q‖p):  Σ e^t·(t−s)/Z_t − (log Z_t − log Z_s)       gradient  p − q
    reverse KL(p‖q):  Σ e^s·(s−t)/Z_s + (log Z_t − log Z_s)       gradient  p·(log p − log q − KL)
    JSD:              w·Σ q·(r − L) + (1−w)·Σ p·(−L)              gradient  (1−w)·p·(−L − KL(p‖m))

where L = log(m/p) = log1p(w·expm1(r)). Every form is exactly 0, with gradient exactly 0, where s and t are equal.

Legend: C tokens of the chunk, V true vocabulary entries of this rank. Collectives: MAX on [2, C] and SUM on [k, C],
k ≤ 6; the JSD, whose mixture needs both normalisers first, adds a SUM on [2, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.collectives import reduce_max_, reduce_sum_
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.vocabulary import row_max

# Beyond this log-ratio the student's share of the mixture is below every float's resolution, and exp would overflow.
_LARGEST_LOG_RATIO = 80.0


class ChunkResult(NamedTuple):
    """Loss, gradient and statistics of one chunk, all replicated over the group but the gradient."""

    loss: Tensor
    """[C]."""

    gradient: Tensor | None
    """[C, V], with respect to the student's logits as given; shares memory with the inputs of `chunk_divergence`."""

    statistics: Tensor | None
    """[4, C]: forward KL, reverse KL, student entropy, target entropy."""


def chunk_divergence(
    s_CV: Tensor,
    t_CV: Tensor,
    divergence: Divergence,
    tp_group: dist.ProcessGroup | None,
    *,
    gradient: bool,
    statistics: bool,
) -> ChunkResult:
    """Divergence between softmax(s) and softmax(t) over the sharded vocabulary. Both inputs are overwritten.

    Memory: three [C, V] tensors in all for the KLs (the two inputs and one more), four for the JSD or with statistics.
    """
    peaks_2C = reduce_max_(torch.stack((row_max(s_CV), row_max(t_CV))), tp_group)
    s_CV.sub_(peaks_2C[0, :, None])
    t_CV.sub_(peaks_2C[1, :, None])

    # Buffers change their meaning here: s becomes e^s, t becomes t − s.
    exp_t_CV = t_CV.exp()
    scratch_CV = torch.empty_like(s_CV) if statistics else None
    sums = {"z_t": exp_t_CV.sum(-1)}
    if scratch_CV is not None:
        sums["e^t·t"] = torch.mul(exp_t_CV, t_CV, out=scratch_CV).sum(-1)
        sums["e^s·s"] = torch.exp(s_CV, out=scratch_CV).mul_(s_CV).sum(-1)
    difference_CV = t_CV.sub_(s_CV)
    exp_s_CV = s_CV.exp_()
    sums["z_s"] = exp_s_CV.sum(-1)
    forward, reverse = divergence.kind == "forward_kl", divergence.kind == "reverse_kl"
    if statistics or forward:
        # Only the reverse KL and the JSD need the difference again.
        product_CV = difference_CV if scratch_CV is None else scratch_CV
        sums["e^t·(t-s)"] = torch.mul(exp_t_CV, difference_CV, out=product_CV).sum(-1)
    if statistics or reverse:
        product_CV = exp_t_CV if scratch_CV is None else scratch_CV
        sums["e^s·(t-s)"] = torch.mul(exp_s_CV, difference_CV, out=product_CV).sum(-1)
    reduced = reduce_sum_(torch.stack(tuple(sums.values())), tp_group)
    total = dict(zip(sums, reduced, strict=True))

    z_s_C, z_t_C = total["z_s"], total["z_t"]
    offset_C = z_t_C.log() - z_s_C.log()
    if "e^t·(t-s)" in total:
        forward_kl_C = total["e^t·(t-s)"] / z_t_C - offset_C
    if "e^s·(t-s)" in total:
        mean_difference_C = total["e^s·(t-s)"] / z_s_C
        reverse_kl_C = offset_C - mean_difference_C

    gradient_CV: Tensor | None = None
    if forward:
        loss_C = forward_kl_C
        if gradient:
            gradient_CV = exp_s_CV.div_(z_s_C[:, None]).sub_(exp_t_CV.div_(z_t_C[:, None]))
    elif reverse:
        loss_C = reverse_kl_C
        if gradient:  # log p − log q − KL: the normalisers cancel
            centred_CV = difference_CV.sub_(mean_difference_C[:, None])
            gradient_CV = exp_s_CV.div_(z_s_C.neg()[:, None]).mul_(centred_CV)
    else:
        w = divergence.weight
        p_CV, q_CV = exp_s_CV.div_(z_s_C[:, None]), exp_t_CV.div_(z_t_C[:, None])
        r_CV = difference_CV.sub_(offset_C[:, None]).clamp_(max=_LARGEST_LOG_RATIO)
        log_m_over_p_CV = torch.expm1(r_CV, out=scratch_CV).mul_(w).log1p_()
        kl_qm_C = r_CV.sub_(log_m_over_p_CV).mul_(q_CV).sum(-1)
        kl_pm_C = torch.mul(p_CV, log_m_over_p_CV, out=r_CV).sum(-1).neg_()
        kl_qm_C, kl_pm_C = reduce_sum_(torch.stack((kl_qm_C, kl_pm_C)), tp_group)
        loss_C = w * kl_qm_C + (1 - w) * kl_pm_C
        if gradient:
            gradient_CV = log_m_over_p_CV.add_(kl_pm_C[:, None]).mul_(p_CV).mul_(w - 1)

    statistics_4C: Tensor | None = None
    if statistics:
        student_entropy_C = z_s_C.log() - total["e^s·s"] / z_s_C
        target_entropy_C = z_t_C.log() - total["e^t·t"] / z_t_C
        statistics_4C = torch.stack((forward_kl_C, reverse_kl_C, student_entropy_C, target_entropy_C))
    return ChunkResult(loss_C, gradient_CV, statistics_4C)
