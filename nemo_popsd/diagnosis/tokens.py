"""Decomposition, divergences and alternatives of given tokens; chunked, over a sharded vocabulary.

Distributions and statistics are defined in `distillation.definition` and `distillation.statistics`.

Shapes: N tokens, C tokens of a chunk, V vocabulary, v true vocabulary entries of this rank, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_popsd.diagnosis.push import VocabularyPush
from nemo_popsd.diagnosis.shards import Largest, at_ids, largest_of_shards
from nemo_popsd.distillation.decomposition import SIGNAL_PRODUCTS, signal_statistics
from nemo_popsd.distillation.definition import Branches, log_softmax, signal_sums, target_from_log_probs
from nemo_popsd.distillation.products import product_into, statistics_dtype
from nemo_popsd.distillation.statistics import TOKEN_STATISTICS, StatisticValues
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.parallel.collectives import reduce_sum_
from nemo_popsd.parallel.vocabulary import VocabShard

DISTRIBUTIONS = ("student", "base", "privileged", "reference", "target")
"""Distributions in the order of `Alternatives` and `TokenDiagnosis.log_probs`."""


class BranchStates(NamedTuple):
    """Final hidden states of the same response tokens in each context, [N, H] each."""

    student: Tensor
    """π_θ: the question; live weights."""
    base: Tensor
    """π_0: the question; frozen weights."""
    privileged: Tensor
    """π_T: question and reference; frozen weights."""
    reference: Tensor
    """π_ref: the reference alone; frozen weights."""


@dataclass(frozen=True)
class TokenDiagnosis:
    """Results for N tokens over the full true vocabulary, in fp32 (float64 for float64 weights), replicated."""

    signal: StatisticValues
    """`SIGNAL_STATISTICS`."""
    statistics: StatisticValues
    """`TOKEN_STATISTICS`."""
    log_probs: Tensor
    """Log-probability of the response's token in each of `DISTRIBUTIONS` [5, N], in nats."""

    def columns(self) -> dict[str, Tensor]:
        """All results by name, [N] each; log-probabilities are named log_student, log_base and so on."""
        declared = [(s.name, values[s.name]) for values in (self.signal, self.statistics) for s in values.declared]
        return dict(declared) | {f"log_{name}": x for name, x in zip(DISTRIBUTIONS, self.log_probs, strict=True)}


class Alternatives(NamedTuple):
    """The most likely tokens of each of `DISTRIBUTIONS`, in descending order; replicated."""

    log_probs: Tensor
    """Log-probabilities [5, N, k]."""
    ids: Tensor
    """Vocabulary ids [5, N, k], int64."""


@torch.no_grad()
def diagnose_tokens(
    states: BranchStates,
    token_ids: Tensor,
    student_weight: Tensor,
    frozen_weight: Tensor,
    *,
    target: Target,
    shard: VocabShard,
    push: VocabularyPush,
    alternatives: int = 0,
    chunk_tokens: int = 128,
) -> tuple[TokenDiagnosis, Alternatives | None]:
    """Decomposes the teacher's signal on N tokens (eq. 4), and measures the target's distance from the student.

    Collectives per chunk: two all-reduces of [C] for each of five log-softmaxes; one all-reduce of [C] if the target
    has a cap; one of all sums; and, with alternatives, one all-gather of [5, C, k] pairs. Memory: twelve tensors
    [C, V_pad/tp], none of size N·V. No gradient.

    Args:
        states: hidden states of each context at these tokens.
        token_ids: tokens of the response [N], int64.
        student_weight: this rank's shard of the live output matrix [V_pad/tp, H].
        frozen_weight: this rank's shard of the frozen output matrix [V_pad/tp, H].
        target: the target P to measure; its temperature applies to all distributions.
        shard: vocabulary entries that the matrices hold.
        push: sums to which these tokens are added.
        alternatives: number of most likely tokens of each distribution to return; 0 for none.
        chunk_tokens: tokens of a chunk.
    """
    dtype = statistics_dtype(student_weight)
    weights = (student_weight, frozen_weight, frozen_weight, frozen_weight)
    columns: list[Tensor] = []
    largest: list[Largest] = []

    def diagnose_chunk(chunk: slice) -> None:
        """A function, so that the tensors of one chunk are freed before the next chunk allocates its own."""
        log_probs = Branches(
            *(
                log_softmax(logits_of(h[chunk], w[: shard.true_width], dtype, target.temperature), shard.group)
                for h, w in zip(states, weights, strict=True)
            )
        )
        log_q = target_from_log_probs(log_probs, target=target, shard=shard)
        if alternatives:
            largest.append(largest_of_shards(_distributions(log_probs, log_q), alternatives, shard))
        columns.append(_columns(log_probs, log_q, token_ids[chunk], shard, push))

    with torch.autocast(states.student.device.type, enabled=False):
        for start in range(0, len(token_ids), chunk_tokens):
            diagnose_chunk(slice(start, start + chunk_tokens))
    sizes = [SIGNAL_PRODUCTS, len(TOKEN_STATISTICS), len(DISTRIBUTIONS)]
    empty = states.student.new_empty(sum(sizes), 0, dtype=dtype)
    products, statistics, log_probs = torch.cat([empty, *columns], dim=1).split(sizes)
    diagnosis = TokenDiagnosis(signal_statistics(products), StatisticValues(TOKEN_STATISTICS, statistics), log_probs)
    if not alternatives:
        return diagnosis, None
    shape = (len(DISTRIBUTIONS), 0, alternatives)
    no_tokens = Largest(empty.new_empty(shape), token_ids.new_empty(shape))
    parts = [no_tokens, *largest]
    return diagnosis, Alternatives(
        torch.cat([part.values for part in parts], dim=1), torch.cat([part.ids for part in parts], dim=1)
    )


def logits_of(h_CH: Tensor, w_vH: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """Logits divided by the temperature [C, v], in `dtype`."""
    z_Cv = torch.empty(len(h_CH), len(w_vH), dtype=dtype, device=h_CH.device)
    product_into(z_Cv, h_CH.to(w_vH.dtype), w_vH.t())
    return z_Cv if temperature == 1 else z_Cv.div_(temperature)


def _distributions(log_probs: Branches, log_q: Tensor) -> list[Tensor]:
    """Log-probabilities in the order of `DISTRIBUTIONS`."""
    frozen = [log_probs.base, log_probs.privileged, log_probs.reference]
    return [log_probs.student, *(x for x in frozen if x is not None), log_q]


def _columns(log_probs: Branches, log_q: Tensor, token_ids: Tensor, shard: VocabShard, push: VocabularyPush) -> Tensor:
    """Norms and products of the signal, token statistics and log-probabilities of a chunk. Adds it to `push`."""
    student, privileged, reference = log_probs.student, log_probs.privileged, log_probs.reference
    assert privileged is not None
    assert reference is not None
    signal = signal_sums(student, privileged, reference)
    statistics = [statistic.definition(student, log_q).sum(-1) for statistic in TOKEN_STATISTICS]
    token_log_probs = [at_ids(x, token_ids, shard) for x in _distributions(log_probs, log_q)]
    p_CV = student.exp()
    deltas = [privileged - student, reference - student, privileged - reference, log_q - student]
    expected = [(p_CV * delta).sum(-1) for delta in deltas]
    sums = reduce_sum_(torch.stack([*signal, *statistics, *token_log_probs, *expected]), shard.group)
    for component_push, delta, mean_C in zip(push.push, deltas, sums[-len(deltas) :], strict=True):
        component_push += delta.sub_(mean_C[:, None]).mul_(p_CV).sum(0, dtype=torch.float64)
    push.mass += p_CV.sum(0, dtype=torch.float64)
    push.tokens += len(token_ids)
    return sums[: -len(deltas)]
