"""Per-token statistics and the paper's decomposition against dense formulas, whole and in shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.distillation import PurifiedTarget, decomposition_statistics
from tests.distillation.calls import DIVERGENCES, TARGETS, hidden_loss
from tests.distillation.dense import dense, divergence_value, log_probs, make_problem, relative
from tests.harness import run_ranks


def _token_statistics_errors(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    whole = make_problem(1).to(dtype)
    group = dist.group.WORLD if world_size > 1 else None
    mine = whole.shard(rank, world_size)
    errors = []
    for target in TARGETS.values():
        for divergence in DIVERGENCES.values():
            want = dense(whole, target, divergence)
            result, _, _ = hidden_loss(mine, target, divergence, group, return_statistics=True)
            got = result.statistics
            errors += [
                relative(got.forward_kl, divergence_value(want.p, want.q, "forward_kl", 0.5)),
                relative(got.reverse_kl, divergence_value(want.p, want.q, "reverse_kl", 0.5)),
                relative(got.student_entropy, -(want.p * want.p.log()).sum(-1)),
                relative(got.target_entropy, -(want.q * want.q.log()).sum(-1)),
                relative(result.per_token, want.loss),
            ]
    return errors


def _decomposition_errors(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    whole = make_problem(2).to(dtype)
    temperature = 1.3
    student, teacher, reference = (
        log_probs(hidden, weight, whole.vocab, temperature)
        for hidden, weight in (
            (whole.student, whole.student_weight),
            (whole.privileged, whole.teacher_weight),
            (whole.reference, whole.teacher_weight),
        )
    )
    total, induced, question = teacher - student, reference - student, teacher - reference
    mine = whole.shard(rank, world_size)
    got = decomposition_statistics(
        mine.student,
        mine.student_weight,
        mine.privileged,
        mine.reference,
        mine.teacher_weight,
        vocab_size=mine.vocab,
        temperature=temperature,
        tp_group=dist.group.WORLD if world_size > 1 else None,
        chunk_tokens=3,
    )
    cosine = torch.nn.functional.cosine_similarity
    return [
        relative(got.norm_ratio, induced.norm(dim=-1) / total.norm(dim=-1)),
        relative(got.cosine_question, cosine(total, question, dim=-1)),
        relative(got.cosine_reference, cosine(total, induced, dim=-1)),
    ]


def _both(rank: int, world_size: int):
    return {
        dtype: _token_statistics_errors(rank, world_size, dtype) + _decomposition_errors(rank, world_size, dtype)
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_statistics_agree_with_dense_formulas(dtype, limit):
    assert max(_token_statistics_errors(0, 1, dtype)) < limit
    assert max(_decomposition_errors(0, 1, dtype)) < limit


def test_statistics_agree_with_dense_formulas_in_shards():
    for found in run_ranks(_both, 2):
        assert max(found[torch.float64]) < 1e-10
        assert max(found[torch.float32]) < 1e-5


def test_asking_for_statistics_does_not_change_loss_or_gradients():
    problem = make_problem(3).to(torch.float32)
    for divergence in DIVERGENCES.values():
        plain, plain_h, plain_w = hidden_loss(problem, PurifiedTarget(), divergence)
        asked, asked_h, asked_w = hidden_loss(problem, PurifiedTarget(), divergence, return_statistics=True)
        assert plain.statistics is None
        plain.total.backward()
        asked.total.backward()
        assert torch.equal(plain.per_token, asked.per_token)
        assert torch.equal(plain_h.grad, asked_h.grad)
        assert torch.equal(plain_w.grad, asked_w.grad)


def test_a_student_equal_to_the_teacher_has_no_decomposition_and_no_tokens_have_none():
    problem = make_problem(4)
    got = decomposition_statistics(
        problem.privileged,
        problem.teacher_weight,
        problem.privileged,
        problem.reference,
        problem.teacher_weight,
        vocab_size=problem.vocab,
    )
    assert all(x.isnan().all() for x in got)
    none = problem.student[:0]
    empty = decomposition_statistics(
        none, problem.student_weight, none, none, problem.teacher_weight, vocab_size=problem.vocab
    )
    assert all(x.shape == (0,) for x in empty)
