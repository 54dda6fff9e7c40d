"""What student, base, teacher, probe and target say of some tokens; chunked, over a vocabulary in shards.

Shapes: N tokens, C tokens of a chunk, V vocabulary, v this rank's true part of it, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.diagnosis.push import VocabularyPush
from nemo_popsd.diagnosis.shards import Largest, at_ids, largest_of_shards
from nemo_popsd.distillation.products import product_into, statistics_dtype
from nemo_popsd.distillation.target import Target
from nemo_popsd.parallel.collectives import reduce_max_, reduce_sum_
from nemo_popsd.parallel.vocabulary import row_max, true_width

DISTRIBUTIONS = ("student", "base", "privileged", "reference", "target")
"""In the order of `Alternatives`."""


class BranchStates(NamedTuple):
    """Final hidden states of the same response tokens in each context, [N, H] each."""

    student: Tensor
    """π_θ: the question; live weights."""
    base: Tensor
    """π_0: the question; frozen weights."""
    privileged: Tensor
    """π_T: question and reference; frozen weights."""
    reference: Tensor
    """π_ref, the probe: the reference alone; frozen weights."""


class TokenDiagnosis(NamedTuple):
    """Per token [N], over the full true vocabulary, in nats; fp32 (float64 for float64 weights), replicated.

    A quotient whose denominator is exactly 0 is NaN. The student's, teacher's and probe's log-probabilities of the
    token give its Δ_total = log π_T − log π_θ = Δ_ref + Δ_it.
    """

    norm_total: Tensor
    """‖Δ_total‖."""
    norm_ratio: Tensor
    """‖Δ_ref‖ / ‖Δ_total‖."""
    cosine_question: Tensor
    """cos(Δ_total, Δ_it)."""
    cosine_reference: Tensor
    """cos(Δ_total, Δ_ref)."""
    student_entropy: Tensor
    """Entropy of π_θ."""
    target_entropy: Tensor
    """Entropy of P."""
    forward_kl: Tensor
    """KL(P ‖ π_θ)."""
    reverse_kl: Tensor
    """KL(π_θ ‖ P)."""
    log_student: Tensor
    """log π_θ of the token that stands there."""
    log_base: Tensor
    """log π_0 of it."""
    log_privileged: Tensor
    """log π_T of it."""
    log_reference: Tensor
    """log π_ref of it."""
    log_target: Tensor
    """log P of it."""


class Alternatives(NamedTuple):
    """The most likely tokens of each distribution, by `DISTRIBUTIONS`, in falling order; replicated."""

    log_probs: Tensor
    """[5, N, k]."""
    ids: Tensor
    """[5, N, k] int64."""


@torch.no_grad()
def diagnose_tokens(
    states: BranchStates,
    token_ids: Tensor,
    student_weight: Tensor,
    frozen_weight: Tensor,
    *,
    target: Target,
    vocab_size: int,
    push: VocabularyPush,
    alternatives: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 128,
    soft_cap: float | None = None,
) -> tuple[TokenDiagnosis, Alternatives | None]:
    """Decomposes the teacher's signal on N tokens (eq. 4), and measures the target's distance from the student.

    Collectives for each chunk: five all-reduces (MAX [4, C], SUM [5, C], MAX [C], SUM [C], SUM [17, C]) and, with
    alternatives, one all-gather of [5, C, k] pairs. Memory: twelve tensors [C, V_pad/tp]; nothing of N·V. No
    gradient.

    Args:
        states: what each context says of these tokens.
        token_ids: [N] int64, the tokens that stand there.
        student_weight: the live output matrix, this rank's rows [V_pad/tp, H].
        frozen_weight: the frozen one.
        target: the member of the family whose P is measured; its temperature applies to all distributions.
        vocab_size: size of the true vocabulary.
        push: to which these tokens are added.
        alternatives: how many of the most likely tokens of each distribution to return; 0 for none.
        tp_group: the group over which the vocabulary is sharded; None for one shard.
        chunk_tokens: tokens of a chunk.
        soft_cap: κ of a model whose final logits are κ·tanh(W·h/κ), else None.

    Raises:
        UserError: the shards together are smaller than the vocabulary.
    """
    width = student_weight.shape[0]
    valid = true_width(width, vocab_size, tp_group)
    dtype = statistics_dtype(student_weight)
    weights = (student_weight, frozen_weight, frozen_weight, frozen_weight)
    columns: list[Tensor] = []
    largest: list[Largest] = []

    def one_chunk(chunk: slice) -> None:
        """A function of its own, so that the logits of one chunk are gone before those of the next are made."""
        logits_4CV = [
            _logits(hidden[chunk], weight[:valid], dtype, target.temperature, soft_cap)
            for hidden, weight in zip(states, weights, strict=True)
        ]
        log_probs, centre_C = _log_softmax_(logits_4CV, vocab_size, tp_group)
        log_q = _target(log_probs, centre_C, target, tp_group)
        if alternatives:
            everyone = (*log_probs, log_q)
            largest.append(largest_of_shards(everyone, alternatives, width=width, tp_group=tp_group))
        columns.append(_columns(log_probs, log_q, token_ids[chunk], width, tp_group, push))

    with torch.autocast(states.student.device.type, enabled=False):
        for start in range(0, len(token_ids), chunk_tokens):
            one_chunk(slice(start, start + chunk_tokens))
    empty = states.student.new_empty(len(TokenDiagnosis._fields), 0, dtype=dtype)
    diagnosis = TokenDiagnosis(*torch.cat([empty, *columns], dim=1))
    if not alternatives:
        return diagnosis, None
    shape = (len(DISTRIBUTIONS), 0, alternatives)
    none = Largest(empty.new_empty(shape), token_ids.new_empty(shape))
    parts = [none, *largest]
    return diagnosis, Alternatives(
        torch.cat([part.values for part in parts], dim=1), torch.cat([part.ids for part in parts], dim=1)
    )


def _logits(h_CH: Tensor, w_vH: Tensor, dtype: torch.dtype, temperature: float, soft_cap: float | None) -> Tensor:
    """Tempered logits z / τ, [C, v]."""
    z_Cv = torch.empty(len(h_CH), len(w_vH), dtype=dtype, device=h_CH.device)
    product_into(z_Cv, h_CH.to(w_vH.dtype), w_vH.t())
    if soft_cap is not None:
        z_Cv.div_(soft_cap).tanh_().mul_(soft_cap)
    return z_Cv if temperature == 1 else z_Cv.div_(temperature)


def _log_softmax_(
    logits_4CV: list[Tensor], vocab_size: int, tp_group: dist.ProcessGroup | None
) -> tuple[list[Tensor], Tensor]:
    """Log-softmax of the four, in place; and the mean over the vocabulary of log π_T − log π_ref, [C]."""
    peaks = reduce_max_(torch.stack([row_max(x) for x in logits_4CV]), tp_group)
    for x, peak in zip(logits_4CV, peaks, strict=True):
        x.sub_(peak[:, None])
    _, _, privileged, reference = logits_4CV
    local = [x.exp().sum(-1) for x in logits_4CV] + [(privileged - reference).sum(-1)]
    sums = reduce_sum_(torch.stack(local), tp_group)
    constants = sums[:4].log()
    for x, constant in zip(logits_4CV, constants, strict=True):
        x.sub_(constant[:, None])
    return logits_4CV, sums[4] / vocab_size - (constants[2] - constants[3])


def _target(log_probs: list[Tensor], centre_C: Tensor, target: Target, tp_group: dist.ProcessGroup | None) -> Tensor:
    """The target's log P (eq. 13-17 for Purified), [C, v]."""
    student, base, privileged, reference = log_probs
    if target.cap is None:
        log_q = privileged * target.privileged
        log_q.add_(reference, alpha=target.reference)
    else:
        log_q = (privileged - reference).sub_(centre_C[:, None]).div_(target.cap).tanh_()
        log_q.mul_(target.cap * target.privileged)
    log_q.add_(base, alpha=target.base).add_(student, alpha=target.student)
    log_q.sub_(reduce_max_(row_max(log_q), tp_group)[:, None])
    return log_q.sub_(reduce_sum_(log_q.exp().sum(-1), tp_group).log()[:, None])


def _columns(
    log_probs: list[Tensor],
    log_q: Tensor,
    token_ids: Tensor,
    width: int,
    tp_group: dist.ProcessGroup | None,
    push: VocabularyPush,
) -> Tensor:
    """The fields of `TokenDiagnosis` for one chunk, [13, C]; adds the chunk to `push`."""
    student, _, privileged, reference = log_probs
    p_CV = student.exp()
    deltas = [privileged - student, reference - student, privileged - reference, log_q - student]
    total, induced, question, towards = deltas
    sums = [(a * b).sum(-1) for a, b in ((total, total), (induced, induced), (question, question))]
    sums += [(total * question).sum(-1), (total * induced).sum(-1)]
    sums += [(p_CV * delta).sum(-1) for delta in deltas]
    q_CV = log_q.exp()
    sums += [(p_CV * student).sum(-1), (q_CV * log_q).sum(-1), (q_CV * towards).sum(-1)]
    sums += [at_ids(x, token_ids, width=width, tp_group=tp_group) for x in (*log_probs, log_q)]
    found = reduce_sum_(torch.stack(sums), tp_group)
    total_norm, induced_norm, question_norm = found[:3].sqrt()
    expected = found[5:9]
    for row, (delta, mean_C) in enumerate(zip(deltas, expected, strict=True)):
        push.push[row] += delta.sub_(mean_C[:, None]).mul_(p_CV).sum(0, dtype=torch.float64)
    push.mass += p_CV.sum(0, dtype=torch.float64)
    push.tokens += len(token_ids)
    return torch.stack(
        [
            total_norm,
            _quotient(induced_norm, total_norm),
            _quotient(found[3], total_norm * question_norm),
            _quotient(found[4], total_norm * induced_norm),
            -found[9],
            -found[10],
            found[11],
            -expected[3],
            *found[12:],
        ]
    )


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.nan, numerator / denominator)
