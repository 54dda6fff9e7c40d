"""Measurements of an answer's tokens against dense formulas in float64, with one shard and with two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nemo_popsd.diagnosis.views.tokens import AnswerStates, ViewFigures, view_figures
from nemo_popsd.distillation import Divergence, Target
from tests.distillation.dense import Problem, divergence_value, log_probs, make_problem, relative, target_log_probs
from tests.harness import run_ranks

TOKENS = torch.tensor([0, 28, 3, 15, 16, 17, 28])
MARKERS, ENDS = torch.tensor([2, 15, 16, 27]), torch.tensor([28])
CASES = {
    "purified": (Target.purified(temperature=1.3), Divergence()),
    "opsd": (Target.opsd(), Divergence(kind="forward_kl")),
    "clipped": (Target.beta_opsd(0.5), Divergence(kind="forward_kl", clip=0.05)),
    "live": (Target.live_student_pmi(cap=3.0), Divergence(kind="reverse_kl")),
    "contrast": (Target.contrast(0.5), Divergence(weight=0.3)),
}


def untrained() -> Problem:
    """A problem whose student equals the base: same output matrix and same states."""
    problem = make_problem(3)
    fields = {**vars(problem), "base": problem.student, "student_weight": problem.teacher_weight}
    return Problem(**fields)


def measured(problem: Problem, target: Target, divergence: Divergence, group=None, *, chunk: int = 3) -> ViewFigures:
    return view_figures(
        AnswerStates(problem.student, problem.privileged, problem.reference),
        TOKENS,
        problem.teacher_weight,
        target=target,
        divergence=divergence,
        shard=problem.vocab_shard(group),
        markers=MARKERS,
        ends=ENDS,
        chunk_tokens=chunk,
    )


def dense(problem: Problem, target: Target, divergence: Divergence) -> dict[str, Tensor]:
    """The expected results by definition; the gradient by autograd of the dense divergence."""
    student, teacher, reference = (
        log_probs(hidden, problem.teacher_weight, problem.vocab, target.temperature)
        for hidden in (problem.student, problem.privileged, problem.reference)
    )
    goal = target_log_probs(problem, target, student)
    distributions = [x.exp() for x in (student, teacher, reference, goal)]
    p, at = student.exp(), TOKENS[:, None]
    logits = student.clone().requires_grad_()
    kind, weight, clip = divergence.kind, divergence.weight, divergence.clip
    loss = divergence_value(logits.softmax(-1), goal.exp(), kind, weight, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    total, induced, question = teacher - student, reference - student, teacher - reference
    return {
        "signal": torch.stack(
            [
                induced.norm(dim=-1) / total.norm(dim=-1),
                cosine_similarity(total, question, dim=-1),
                cosine_similarity(total, induced, dim=-1),
            ]
        ),
        "entropy": -(p * student).sum(-1),
        "distance": (goal.exp() * (goal - student)).sum(-1),
        "probability": torch.stack([d.gather(1, at)[:, 0] for d in distributions]),
        "favour": torch.stack([d.gather(1, at)[:, 0] - (p * d).sum(-1) for d in distributions]),
        "lift": (p * gradient).sum(-1) - gradient.gather(1, at)[:, 0],
        "markers": torch.stack([d[:, MARKERS].sum(-1) for d in (p, goal.exp())]),
        "ends": torch.stack([d[:, ENDS].sum(-1) for d in (p, goal.exp())]),
    }


def errors(rank: int, world_size: int) -> dict[str, float]:
    """Largest relative error of each figure over all cases."""
    problem, worst = untrained(), dict[str, float]()
    group = dist.group.WORLD if world_size > 1 else None
    for target, divergence in CASES.values():
        found = measured(problem.shard(rank, world_size), target, divergence, group)
        for name, want in dense(problem, target, divergence).items():
            worst[name] = max(worst.get(name, 0.0), relative(getattr(found, name), want))
    return worst


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_figures_agree_with_dense_formulas(ranks: int) -> None:
    for found in [errors(0, 1)] if ranks == 1 else run_ranks(errors, ranks):
        assert sorted(found) == sorted(ViewFigures._fields)
        assert {name: error for name, error in found.items() if error > 1e-10} == {}


def test_the_lift_of_forward_kl_is_the_favour_of_the_target_minus_that_of_the_student() -> None:
    found = measured(untrained(), Target.purified(), Divergence(kind="forward_kl"))
    torch.testing.assert_close(found.lift, found.favour[3] - found.favour[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_the_students_tokens_is_0_at_every_state(name: str) -> None:
    """Therefore the favour of right answers depends on their tokens, not on the states that they visit."""
    target, divergence = CASES[name]
    problem = untrained()
    state = AnswerStates(problem.student[:1], problem.privileged[:1], problem.reference[:1])
    every = torch.arange(problem.vocab)
    repeated = AnswerStates(*(hidden.expand(problem.vocab, -1) for hidden in state))
    found = view_figures(
        repeated,
        every,
        problem.teacher_weight,
        target=target,
        divergence=divergence,
        shard=problem.vocab_shard(),
        markers=MARKERS,
        ends=ENDS,
    )
    p = found.probability[0]
    torch.testing.assert_close((p * found.favour).sum(-1), torch.zeros(4, dtype=p.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close((p * found.lift).sum(), p.new_zeros(()), rtol=0, atol=1e-12)
    assert found.lift.abs().max() > 1e-3


def test_a_target_equal_to_the_student_has_no_lift() -> None:
    """OPSD whose teacher sees the student's prompt, as with the view `none`."""
    problem = untrained()
    same = Problem(**{**vars(problem), "privileged": problem.student})
    found = measured(same, Target.opsd(), Divergence())
    assert found.lift.abs().max() < 1e-12
    assert found.distance.abs().max() < 1e-12
    assert torch.equal(found.markers[0], found.markers[1])


def test_no_tokens_have_empty_results() -> None:
    problem = untrained()
    none = AnswerStates(*(hidden[:0] for hidden in (problem.student, problem.privileged, problem.reference)))
    found = view_figures(
        none,
        TOKENS[:0],
        problem.teacher_weight,
        target=Target.purified(),
        divergence=Divergence(),
        shard=problem.vocab_shard(),
        markers=MARKERS,
        ends=ENDS,
    )
    assert found.favour.shape == (4, 0)
    assert found.lift.shape == (0,)
