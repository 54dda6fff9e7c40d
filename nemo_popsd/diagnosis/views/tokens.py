r"""Measures the tokens of the student's answers under one target; chunked, over a sharded vocabulary.

The student is untrained and thus equals the base. With p = π_θ, a distribution D and the token y of the answer:

    favour_D = D(y) − Σ_v p(v) · D(v)

is the probability of y under D minus that of the tokens that the student would generate there. Its mean over y ~ p is 0
at every state. To first order, a step that adds −∂loss/∂z to the student's logits z changes log p(y) by

    lift = −g(y) + Σ_v p(v) · g(v),   g = ∂loss/∂z,

whose mean is also 0. For forward KL, g = p − P, so lift = favour_P − favour_p.

Shapes: N tokens, C tokens of a chunk, v true vocabulary entries of this rank, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_popsd.diagnosis.shards import at_ids
from nemo_popsd.diagnosis.tokens import logits_of
from nemo_popsd.distillation.decomposition import SIGNAL_PRODUCTS, signal_statistics
from nemo_popsd.distillation.definition import Branches, log_softmax, signal_sums, target_from_log_probs
from nemo_popsd.distillation.divergence import Divergence, divergence_of_log_probs
from nemo_popsd.distillation.products import statistics_dtype
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.parallel.collectives import reduce_sum_
from nemo_popsd.parallel.vocabulary import VocabShard

DISTRIBUTIONS = ("student", "teacher", "reference_only", "target")
"""Distributions in the order of results that exist for each."""


class AnswerStates(NamedTuple):
    """Final hidden states of the same answer tokens in three contexts, [N, H] each."""

    student: Tensor
    """The question; π_θ = π_0."""
    teacher: Tensor
    """Question and reference; π_T."""
    reference_only: Tensor
    """The reference alone, or the second context of the family; π_ref."""


class ViewFigures(NamedTuple):
    """Results for N tokens over the full true vocabulary, fp32 (float64 for float64 weights), replicated."""

    signal: Tensor
    """`SIGNAL_STATISTICS` [3, N]."""
    entropy: Tensor
    """Entropy of the student [N], in nats."""
    distance: Tensor
    """KL(P ‖ π_θ) [N], in nats."""
    probability: Tensor
    """Probability of the answer's token [4, N], in the order of `DISTRIBUTIONS`."""
    favour: Tensor
    """Favour of the answer's token [4, N], in the order of `DISTRIBUTIONS`."""
    lift: Tensor
    """First-order change of log π_θ of the answer's token [N]."""
    markers: Tensor
    """Probability of the marker entries under student and target [2, N]."""
    ends: Tensor
    """Probability of the entries that end the answer under student and target [2, N]."""


def view_figures(
    states: AnswerStates,
    token_ids: Tensor,
    weight: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    shard: VocabShard,
    markers: Tensor,
    ends: Tensor,
    chunk_tokens: int = 128,
) -> ViewFigures:
    """Measures N tokens of an answer under one target.

    Collectives per chunk: two all-reduces of [C] for each of five log-softmaxes (one more in a backward pass); one
    all-reduce of [C] if the target has a cap; one for the divergence; one of all sums. Memory: about twelve tensors
    [C, V_pad/tp], none of size N·V. No gradient remains.

    Args:
        states: hidden states of the contexts at these tokens.
        token_ids: tokens of the answer [N], int64.
        weight: this rank's shard [V_pad/tp, H] of the output matrix of student and frozen branches.
        target: the target P to measure; its temperature applies to all distributions.
        divergence: the loss whose gradient determines `lift`.
        shard: vocabulary entries that the matrix holds.
        markers: vocabulary ids of the markers.
        ends: vocabulary ids that end an answer.
        chunk_tokens: tokens of a chunk.
    """
    dtype = statistics_dtype(weight)
    w_vH = weight[: shard.true_width]
    local = [
        ids[(ids >= shard.offset) & (ids < shard.offset + shard.true_width)] - shard.offset for ids in (markers, ends)
    ]

    def sums_of(chunk: slice) -> Tensor:
        """A function, so that the tensors of one chunk are freed before the next chunk allocates its own."""
        z_Cv, z_teacher, z_reference = (logits_of(h[chunk], w_vH, dtype, target.temperature) for h in states)
        student, teacher, reference = (log_softmax(z, shard.group) for z in (z_Cv, z_teacher, z_reference))
        log_probs = Branches(student, student, teacher, reference)
        log_q = target_from_log_probs(log_probs, target=target, shard=shard)
        g_Cv = _gradient(z_Cv, log_q, divergence, shard)
        p_Cv = student.exp()
        by_distribution = (student, teacher, reference, log_q)
        signal = signal_sums(student, teacher, reference)
        terms = [
            -(p_Cv * student).sum(-1),
            (log_q.exp() * (log_q - student)).sum(-1),
            *(at_ids(log_d, token_ids[chunk], shard) for log_d in by_distribution),
            *((p_Cv * log_d.exp()).sum(-1) for log_d in by_distribution),
            at_ids(g_Cv, token_ids[chunk], shard),
            (p_Cv * g_Cv).sum(-1),
            *(log_d[:, ids].exp().sum(-1) for ids in local for log_d in (student, log_q)),
        ]
        return reduce_sum_(torch.cat([signal, torch.stack(terms)]), shard.group)

    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        parts = [sums_of(slice(start, start + chunk_tokens)) for start in range(0, len(token_ids), chunk_tokens)]
    sizes = [SIGNAL_PRODUCTS, 1, 1, len(DISTRIBUTIONS), len(DISTRIBUTIONS), 1, 1, 2, 2]
    empty = states.student.new_empty(sum(sizes), 0, dtype=dtype)
    products, entropy, distance, log_at, expected, g_at, g_expected, marker_mass, end_mass = torch.cat(
        [empty, *parts], dim=1
    ).split(sizes)
    probability = log_at.exp()
    return ViewFigures(
        signal=signal_statistics(products).values,
        entropy=entropy[0],
        distance=distance[0],
        probability=probability,
        favour=probability - expected,
        lift=(g_expected - g_at)[0],
        markers=marker_mass,
        ends=end_mass,
    )


def _gradient(z_Cv: Tensor, log_q: Tensor, divergence: Divergence, shard: VocabShard) -> Tensor:
    """This rank's shard of ∂loss/∂z for each token, [C, v], from the definition of the divergence."""
    with torch.enable_grad():
        logits = z_Cv.detach().requires_grad_()
        loss_C = divergence_of_log_probs(log_softmax(logits, shard.group), log_q, divergence, shard.group)
        (gradient,) = torch.autograd.grad(loss_C.sum(), logits)
    return gradient
