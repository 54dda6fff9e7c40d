"""Per-token statistics and the paper's decomposition against dense formulas, with one shard and with two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.distillation import Divergence, Target
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS
from tests.distillation.calls import DIVERGENCES, TARGETS, diagnosed, hidden_loss
from tests.distillation.dense import dense, divergence_value, log_probs, make_problem, relative
from tests.harness import run_ranks


def _token_statistics_errors(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    problem = make_problem(1).to(dtype)
    group = dist.group.WORLD if world_size > 1 else None
    problem_shard = problem.shard(rank, world_size)
    errors = []
    for target in TARGETS.values():
        for divergence in DIVERGENCES.values():
            want = dense(problem, target, divergence)
            result, _, _ = hidden_loss(problem_shard, target, divergence, group)
            got = result.statistics
            errors += [
                relative(got["forward_kl"], divergence_value(want.p, want.q, "forward_kl", 0.5)),
                relative(got["reverse_kl"], divergence_value(want.p, want.q, "reverse_kl", 0.5)),
                relative(got["student_entropy"], -(want.p * want.p.log()).sum(-1)),
                relative(got["target_entropy"], -(want.q * want.q.log()).sum(-1)),
                relative(result.per_token, want.loss),
            ]
    return errors


def _decomposition_errors(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    """With and without a shift, which yields the reference's logits; all, some or none of a chunk's tokens sampled."""
    problem = make_problem(2, tokens=11).to(dtype)
    index = [0, 1, 2, 4, 9]
    cosine = torch.nn.functional.cosine_similarity
    group = dist.group.WORLD if world_size > 1 else None
    errors = []
    for target in (Target.purified(temperature=1.3), Target.purified(cap=None, temperature=0.8), Target.opsd()):
        student, teacher, reference = (
            log_probs(hidden[index], weight, problem.vocab, target.temperature)
            for hidden, weight in (
                (problem.student, problem.student_weight),
                (problem.privileged, problem.teacher_weight),
                (problem.reference, problem.teacher_weight),
            )
        )
        total, induced, question = teacher - student, reference - student, teacher - reference
        for divergence in (Divergence(), Divergence("reverse_kl")):
            problem_shard = problem.shard(rank, world_size)
            result, _, _ = hidden_loss(
                problem_shard, target, divergence, group, diagnosed=diagnosed(problem_shard, index)
            )
            plain, _, _ = hidden_loss(problem_shard, target, divergence, group)
            torch.testing.assert_close(result.per_token, plain.per_token)
            assert plain.decomposition is None
            got = result.decomposition
            errors += [
                relative(got["norm_ratio"], induced.norm(dim=-1) / total.norm(dim=-1)),
                relative(got["cosine_question"], cosine(total, question, dim=-1)),
                relative(got["cosine_reference"], cosine(total, induced, dim=-1)),
            ]
    return errors


def _both(rank: int, world_size: int):
    return {
        dtype: _token_statistics_errors(rank, world_size, dtype) + _decomposition_errors(rank, world_size, dtype)
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_statistics_agree_with_dense_formulas(dtype, limit):
    assert max(_token_statistics_errors(0, 1, dtype)) < limit
    assert max(_decomposition_errors(0, 1, dtype)) < limit


@pytest.mark.slow
def test_statistics_agree_with_dense_formulas_in_shards():
    for found in run_ranks(_both, 2):
        assert max(found[torch.float64]) < 1e-10
        assert max(found[torch.float32]) < 1e-5


def test_the_decomposition_is_undefined_where_student_and_teacher_agree_and_empty_without_a_sample():
    problem = make_problem(4)
    same = type(problem)(**{**vars(problem), "student": problem.privileged, "student_weight": problem.teacher_weight})
    result, _, _ = hidden_loss(same, Target.purified(), Divergence(), shared=True, diagnosed=diagnosed(same))
    assert result.decomposition.values.isnan().all()
    result, _, _ = hidden_loss(same, Target.purified(), Divergence(), diagnosed=diagnosed(same, []))
    assert result.decomposition.values.shape == (len(SIGNAL_STATISTICS), 0)
