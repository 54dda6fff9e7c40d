"""Computes both forms of the loss on a `Problem` and compares them with the dense loss; on one process or on ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from nemo_popsd.distillation import (
    Branches,
    DiagnosedTokens,
    Divergence,
    Gates,
    HiddenPair,
    Target,
    hidden_pair,
    loss_from_hidden,
    loss_from_logits,
)
from tests.distillation.dense import Problem, dense, make_problem, relative

TARGETS = {
    "purified": Target.purified(),
    "purified, cap 2, beta 0.7, temperature 1.3": Target.purified(0.7, 2.0, 1.3),
    "purified, cap 1, beta 3": Target.purified(3.0, 1.0),
    "purified, no cap, temperature 0.8": Target.purified(2.0, None, 0.8),
    "purified, cap 4, beta 1.5, temperature 1.1": Target.purified(1.5, 4.0, 1.1),
    "opsd": Target.opsd(),
    "beta-opsd, base": Target.beta_opsd(0.3, temperature=1.2),
    "beta-opsd, student": Target.beta_opsd(0.6, "student"),
    "contrast": Target.contrast(0.5),
    "student pmi": Target.live_student_pmi(1.4, 3.0, 0.9),
    "student pmi, no cap": Target.live_student_pmi(2.0, None),
    "everything": Target(student=0.2, base=0.5, privileged=0.9, reference=-0.4, temperature=1.1),
}
DIVERGENCES = {
    "jsd": Divergence(),
    "jsd 0.2": Divergence("jsd", 0.2),
    "jsd 0.9": Divergence("jsd", 0.9),
    "forward": Divergence("forward_kl"),
    "reverse": Divergence("reverse_kl"),
    # The clip affects some entries of most tokens; the last clip affects nearly all entries.
    "jsd, clip": Divergence("jsd", 0.3, clip=0.02),
    "forward, clip": Divergence("forward_kl", clip=0.05),
    "reverse, clip": Divergence("reverse_kl", clip=0.05),
    "forward, small clip": Divergence("forward_kl", clip=1e-4),
}
GATES = {
    "probability": Gates(max_student_probability=0.5),
    "student's entropy": Gates(student_entropy=(1.0, 2.0)),
    "target's entropy": Gates(target_entropy=(1.2, math.inf)),
    "all": Gates(max_student_probability=0.8, student_entropy=(0.4, 2.5), target_entropy=(0.3, 2.2)),
}
# (true vocabulary, padded): padding is part of the last shard; absent; with TP=2 the whole second shard.
VOCABULARIES = ((29, 32), (32, 32), (13, 32))
CHUNKS = (1, 3, 7, 100)


@dataclass(frozen=True)
class Errors:
    case: str
    loss: float
    total: float
    dh: float
    dw: float
    padding: float


def vectors_of(problem: Problem, target: Target) -> HiddenPair:
    return hidden_pair(target, base=problem.base, privileged=problem.privileged, reference=problem.reference)


def hidden_loss(problem: Problem, target, divergence, group=None, *, dh: bool = True, dw: bool = True, **settings):
    """`loss_from_hidden` and the leaves of its inputs. With `shared`, student and teacher use the teacher's matrix."""
    shared = settings.pop("shared", False)
    hidden = problem.student.clone().requires_grad_(dh)
    weight = (problem.teacher_weight if shared else problem.student_weight).clone().requires_grad_(dw)
    vectors = vectors_of(problem, target)
    settings = {"token_weights": problem.token_weights, "chunk_tokens": 3, **settings}
    result = loss_from_hidden(
        hidden,
        weight,
        vectors,
        weight.detach() if shared else problem.teacher_weight,
        target=target,
        divergence=divergence,
        shard=problem.vocab_shard(group),
        **settings,
    )
    return result, hidden, weight


def diagnosed(problem: Problem, index=None) -> DiagnosedTokens:
    """The tokens in `index`, or all tokens, as input of the decomposition."""
    index = torch.arange(len(problem.student)) if index is None else torch.tensor(index, dtype=torch.long)
    return DiagnosedTokens(index, problem.privileged[index], problem.reference[index])


def logits_loss(problem: Problem, target, divergence, group=None):
    """`loss_from_logits` on this shard's logits, and the student's logits."""

    def frozen(hidden):
        return hidden @ problem.teacher_weight.T

    student = (problem.student @ problem.student_weight.T).requires_grad_()
    loss = loss_from_logits(
        Branches(
            student,
            base=frozen(problem.base),
            privileged=frozen(problem.privileged),
            reference=frozen(problem.reference),
        ),
        target=target,
        divergence=divergence,
        shard=problem.vocab_shard(group),
    )
    return loss, student


def all_cases() -> list[tuple[str, str, tuple[int, int], int]]:
    """Every target with every divergence; vocabularies and chunk sizes alternate."""
    turns = zip(itertools.cycle(VOCABULARIES), itertools.cycle(CHUNKS), strict=False)
    return [(t, d, v, c) for (t, d), (v, c) in zip(itertools.product(TARGETS, DIVERGENCES), turns, strict=False)]


def compare(case, dtype: torch.dtype, seed: int, rank: int = 0, size: int = 1, group=None) -> list[Errors]:
    """Errors of both forms against the dense reference on the same (rounded) inputs."""
    target_name, divergence_name, (vocab, padded), chunk = case
    target, divergence = TARGETS[target_name], DIVERGENCES[divergence_name]
    problem = make_problem(seed, vocab=vocab, padded=padded, sharpness=0.7).to(dtype)
    want = dense(problem, target, divergence)
    problem_shard = problem.shard(rank, size)
    width = problem_shard.student_weight.shape[0]
    columns = slice(rank * width, (rank + 1) * width)
    true = min(max(vocab - rank * width, 0), width)
    total = (want.loss * problem.token_weights.double()).sum()
    name = f"{target_name} | {divergence_name} | vocab {vocab}/{padded} | chunk {chunk} | {dtype}"

    result, hidden, weight = hidden_loss(problem_shard, target, divergence, group, chunk_tokens=chunk)
    result.total.backward()
    from_hidden = Errors(
        f"hidden | {name}",
        relative(result.per_token, want.loss),
        relative(result.total.detach(), total),
        relative(hidden.grad, want.dh),
        relative(weight.grad, want.dw[columns]) if true else weight.grad.abs().max().item(),
        weight.grad[true:].abs().sum().item(),
    )
    loss, logits = logits_loss(problem_shard, target, divergence, group)
    weighted = (loss * problem_shard.token_weights).sum()
    weighted.backward()
    from_logits = Errors(
        f"logits | {name}",
        relative(loss.detach(), want.loss),
        relative(weighted.detach(), total),
        relative(logits.grad, want.dz[:, columns]) if true else logits.grad.abs().max().item(),
        0.0,
        logits.grad[:, true:].abs().sum().item(),
    )
    assert result.per_token.dtype == loss.dtype == dtype
    return [from_hidden, from_logits]


def compare_gated(
    gate: str, divergence_name: str, dtype: torch.dtype, seed: int, rank: int = 0, size: int = 1, group=None
) -> Errors:
    """Errors of the gated loss against the dense loss with weight 0 for the tokens that its own p and q close."""
    target, divergence, gates = (
        TARGETS["purified, cap 2, beta 0.7, temperature 1.3"],
        DIVERGENCES[divergence_name],
        GATES[gate],
    )
    problem = make_problem(seed, tokens=40, sharpness=0.9).to(dtype)
    plain = dense(problem, target, divergence)
    entropies = [-(x * x.log()).sum(-1) for x in (plain.p, plain.q)]
    is_open = plain.p.amax(-1) <= gates.max_student_probability
    for entropy, (low, high) in zip(entropies, (gates.student_entropy, gates.target_entropy), strict=True):
        is_open &= (entropy >= low) & (entropy <= high)
    assert 5 < is_open.sum() < 35, "the gate closes some and not all"
    gated = with_(problem, token_weights=problem.token_weights * is_open)
    want = dense(gated, target, divergence)
    shard = problem.shard(rank, size)
    width = shard.student_weight.shape[0]
    result, hidden, weight = hidden_loss(shard, target, divergence, group, gates=gates, chunk_tokens=7)
    result.total.backward()
    assert torch.equal(result.is_open, is_open.to(dtype))
    true = min(max(problem.vocab - rank * width, 0), width)
    return Errors(
        f"{gate} | {divergence_name} | {dtype}",
        relative(result.per_token, want.loss),
        relative(result.total.detach(), (want.loss * gated.token_weights.double()).sum()),
        relative(hidden.grad, want.dh),
        relative(weight.grad, want.dw[rank * width : (rank + 1) * width]),
        weight.grad[true:].abs().sum().item() + hidden.grad[~is_open].abs().sum().item(),
    )


def worst(errors: list[Errors]) -> float:
    return max(max(e.loss, e.total, e.dh, e.dw) for e in errors)


def with_(problem, **fields):
    """`problem` with some fields replaced."""
    return type(problem)(**{**vars(problem), **fields})
