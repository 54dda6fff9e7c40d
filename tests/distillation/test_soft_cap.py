"""A model with softly capped logits, z = κ·tanh(W·h/κ), against the definition under autograd, whole and in shards."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.distillation import Divergence, frozen_states, hidden_pair, loss_from_hidden
from tests.distillation.calls import TARGETS, diagnosed
from tests.distillation.dense import dense, divergence_value, make_problem, relative, target_log_probs
from tests.harness import run_ranks

KAPPA = 2.0
DIVERGENCES = {"jsd": Divergence("jsd", 0.3), "forward": Divergence("forward_kl"), "reverse": Divergence("reverse_kl")}
NAMES = ("purified, cap 2, beta 0.7, temperature 1.3", "purified, no cap, temperature 0.8", "opsd", "everything")


def wanted(problem, target, divergence):
    """Loss, dh and dW by autograd: the capped logits as states of a problem whose matrices are the identity."""
    problem = problem.to(torch.float64)
    hidden, weight = problem.student.clone().requires_grad_(), problem.student_weight.clone().requires_grad_()

    def capped(states, matrix):
        return KAPPA * torch.tanh(states @ matrix.T / KAPPA)

    student = capped(hidden, weight)
    one = torch.eye(weight.shape[0], dtype=torch.float64)
    frozen = {n: capped(getattr(problem, n), problem.teacher_weight) for n in ("base", "privileged", "reference")}
    as_states = type(problem)(
        **{**vars(problem), **frozen, "student": student.detach(), "student_weight": one, "teacher_weight": one}
    )
    log_p = torch.log_softmax(student[:, : problem.vocab] / target.temperature, -1)
    q = target_log_probs(as_states, target, log_p.detach()).exp()
    loss = divergence_value(log_p.exp(), q, divergence.kind, divergence.weight)
    (loss * problem.token_weights).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def errors(rank: int, size: int, dtype: torch.dtype, fused: str = "never") -> list[float]:
    group = dist.group.WORLD if size > 1 else None
    found = []
    for name, divergence in itertools.product(NAMES, DIVERGENCES.values()):
        target = TARGETS[name]
        whole = make_problem(1).to(dtype)
        loss, dh, dw = wanted(whole, target, divergence)
        mine = whole.shard(rank, size)
        hidden, weight = mine.student.clone().requires_grad_(), mine.student_weight.clone().requires_grad_()
        result = loss_from_hidden(
            hidden,
            weight,
            frozen_states(target, mine.base, mine.privileged, mine.reference, soft_cap=KAPPA),
            mine.teacher_weight,
            target=target,
            divergence=divergence,
            vocab_size=mine.vocab,
            tp_group=group,
            token_weights=mine.token_weights,
            chunk_tokens=3,
            soft_cap=KAPPA,
            fused=fused,
            diagnosed=diagnosed(mine, [1, 5]),
        )
        result.total.backward()
        width = weight.shape[0]
        found += [
            relative(result.per_token, loss),
            relative(hidden.grad, dh),
            relative(weight.grad, dw[rank * width : (rank + 1) * width]),
        ]
    return found


def test_one_shard_agrees_with_the_definition():
    assert max(errors(0, 1, torch.float64)) < 1e-10
    assert max(errors(0, 1, torch.float32)) < 1e-5


@pytest.mark.slow
def test_fused_agrees_with_the_definition():
    assert max(errors(0, 1, torch.float32, "always")) < 1e-5


def test_two_shards_agree_with_the_definition():
    for found in run_ranks(errors, 2, torch.float64):
        assert max(found) < 1e-10


def test_a_cap_beyond_all_logits_is_no_cap():
    problem = make_problem(2)
    target, divergence = TARGETS["purified"], Divergence()
    want = dense(problem, target, divergence)
    states = frozen_states(target, problem.base, problem.privileged, problem.reference, soft_cap=1e6)
    arguments = (problem.student, problem.student_weight, states, problem.teacher_weight)
    settings = {"target": target, "divergence": divergence, "vocab_size": 29}
    assert relative(loss_from_hidden(*arguments, **settings, soft_cap=1e6).per_token, want.loss) < 1e-6
    with pytest.raises(ValueError, match="need HiddenPair"):
        loss_from_hidden(*arguments, **settings)
    pair = hidden_pair(target, problem.base, problem.privileged, problem.reference)
    with pytest.raises(ValueError, match="need SeparateStates"):
        loss_from_hidden(arguments[0], arguments[1], pair, arguments[3], **settings, soft_cap=30.0)
