"""Trap 12: identities that hold for every input, as property-based tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_popsd.distillation import (
    Branches,
    Divergence,
    Target,
    loss_from_logits,
)
from nemo_popsd.parallel.vocabulary import VocabShard
from tests.distillation.calls import diagnosed, hidden_loss, with_
from tests.distillation.dense import log_probs, make_problem
from tests.distillation.test_traps import implied_target, square_problem

quick = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
betas = st.floats(0.2, 20.0)
caps = st.one_of(st.none(), st.floats(0.5, 50.0))
temperatures = st.floats(0.5, 2.0)
forms = st.sampled_from(["hidden", "logits"])
divergences = st.one_of(
    st.builds(Divergence, st.just("jsd"), st.floats(0.05, 0.95)),
    st.sampled_from([Divergence("forward_kl"), Divergence("reverse_kl")]),
)


def probs(problem, field: str, temperature: float) -> torch.Tensor:
    return log_probs(getattr(problem, field), problem.teacher_weight, problem.vocab, temperature).exp()


@quick
@given(seeds, betas, caps, temperatures, forms)
def test_trap_12_equal_teachers_leave_the_base(seed, beta, cap, temperature, form):
    problem = square_problem(seed)
    problem = with_(problem, reference=problem.privileged)
    target = Target.purified(beta, cap, temperature)
    torch.testing.assert_close(implied_target(problem, target, form=form), probs(problem, "base", temperature))


@quick
@given(seeds, caps, temperatures, forms)
def test_trap_12_a_large_beta_leaves_the_base(seed, cap, temperature, form):
    problem = square_problem(seed)
    target = Target.purified(1e9, cap, temperature)
    want = probs(problem, "base", temperature)
    torch.testing.assert_close(implied_target(problem, target, form=form), want, rtol=1e-5, atol=1e-6)


@quick
@given(seeds, temperatures, forms)
def test_trap_12_a_reference_equal_to_the_base_gives_plain_opsd(seed, temperature, form):
    problem = square_problem(seed)
    problem = with_(problem, reference=problem.base)
    want = probs(problem, "privileged", temperature)
    for target in (Target.purified(1.0, None, temperature), Target.opsd(temperature)):
        torch.testing.assert_close(implied_target(problem, target, form=form), want)


@quick
@given(seeds, betas, caps, temperatures, divergences, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_trap_12_a_student_equal_to_base_and_target_has_loss_and_gradient_exactly_0(
    seed, beta, cap, temperature, divergence, dtype
):
    problem = make_problem(seed)
    problem = with_(
        problem, base=problem.student, reference=problem.privileged, student_weight=problem.teacher_weight
    ).to(dtype)
    target = Target.purified(beta, cap, temperature)
    result, hidden, weight = hidden_loss(problem, target, divergence)
    result.total.backward()
    assert result.total.item() == 0
    assert result.per_token.count_nonzero() == 0
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0
    assert result.statistics["forward_kl"].count_nonzero() == 0
    assert result.statistics["reverse_kl"].count_nonzero() == 0


@quick
@given(seeds, betas, caps, temperatures, divergences)
def test_trap_12_the_loss_from_logits_is_then_0_up_to_rounding(seed, beta, cap, temperature, divergence):
    """In contrast, `loss_from_hidden` is exactly 0."""
    same, teacher = (
        torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)
    )
    student = same.clone().requires_grad_()
    loss = loss_from_logits(
        Branches(student, base=same, privileged=teacher, reference=teacher),
        target=Target.purified(beta, cap, temperature),
        divergence=divergence,
        shard=VocabShard(29, 32),
    )
    loss.sum().backward()
    assert loss.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


@quick
@given(seeds, betas, caps, temperatures, divergences, st.lists(st.floats(-20, 20), min_size=4, max_size=4))
def test_trap_12_a_constant_added_to_a_row_of_logits_changes_nothing(
    seed, beta, cap, temperature, divergence, constants
):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(5, 32, dtype=torch.float64, generator=generator) for _ in range(4)]
    target = Target.purified(beta, cap, temperature)

    def run(rows):
        student = rows[0].clone().requires_grad_()
        loss = loss_from_logits(
            Branches(student, *rows[1:]), target=target, divergence=divergence, shard=VocabShard(29, 32)
        )
        loss.sum().backward()
        return loss.detach(), student.grad

    shifted = [x + constant for x, constant in zip(logits, constants, strict=True)]
    for got, want in zip(run(shifted), run(logits), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@quick
@given(seeds, betas, caps, temperatures, divergences, st.floats(-3, 3))
def test_trap_12_a_vector_added_to_every_output_vector_changes_nothing(seed, beta, cap, temperature, divergence, size):
    """The same identity for hidden states: W + 1·uᵀ adds a constant to each row of logits."""
    problem = make_problem(seed)
    row = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    moved = with_(problem, student_weight=problem.student_weight + row, teacher_weight=problem.teacher_weight - 2 * row)
    target = Target.purified(beta, cap, temperature)
    want, _, want_w = hidden_loss(problem, target, divergence)
    got, _, got_w = hidden_loss(moved, target, divergence)
    want.total.backward()
    got.total.backward()
    torch.testing.assert_close(got.per_token, want.per_token, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got_w.grad, want_w.grad, rtol=1e-8, atol=1e-11)


@quick
@given(seeds, betas, caps, temperatures, forms)
def test_trap_12_the_target_sums_to_1_and_is_a_distribution(seed, beta, cap, temperature, form):
    p = implied_target(square_problem(seed), Target.purified(beta, cap, temperature), form=form)
    torch.testing.assert_close(p.sum(-1), torch.ones(7, dtype=torch.float64))
    assert p.min() > -1e-14


@quick
@given(seeds, temperatures)
def test_trap_12_total_is_reference_part_plus_question_part(seed, temperature):
    """In terms of the statistics: ⟨Δ_total, Δ_it⟩ = ‖Δ_total‖² − ⟨Δ_total, Δ_ref⟩."""
    problem = make_problem(seed)
    target = Target.purified(temperature=temperature)
    result, _, _ = hidden_loss(problem, target, Divergence(), diagnosed=diagnosed(problem))
    ratio, question, induced = result.decomposition.values
    question_norm = (1 + ratio**2 - 2 * ratio * induced).sqrt()
    torch.testing.assert_close(question * question_norm, 1 - ratio * induced)


@quick
@given(seeds, betas, temperatures, divergences)
def test_the_divergence_is_never_negative_and_the_jsd_is_bounded(seed, beta, temperature, divergence):
    result, _, _ = hidden_loss(make_problem(seed), Target.purified(beta, 10.0, temperature), divergence)
    assert result.per_token.min() >= 0
    if divergence.kind == "jsd":
        w = divergence.weight
        assert result.per_token.max() <= -(w * math.log(w) + (1 - w) * math.log(1 - w))


@pytest.mark.parametrize("cap", [None, 10.0])
def test_purified_is_the_target_of_its_coefficients(cap):
    problem = make_problem(2)
    by_name, _, _ = hidden_loss(problem, Target.purified(1.7, cap, 1.2), Divergence())
    coefficients = Target(base=1.0, privileged=1 / 1.7, reference=-1 / 1.7, cap=cap, temperature=1.2)
    by_coefficients, _, _ = hidden_loss(problem, coefficients, Divergence())
    assert torch.equal(by_name.per_token, by_coefficients.per_token)
