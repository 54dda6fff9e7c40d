"""The published targets, invalid targets, and the two vectors to which a target is reduced."""

from __future__ import annotations

import pytest
import torch

from nemo_popsd.distillation import Branches, Divergence, Target, hidden_pair, loss_from_logits
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.vocabulary import VocabShard
from tests.distillation.calls import TARGETS, vectors_of
from tests.distillation.dense import make_problem

# student, base, privileged, reference, cap
TABLE = {
    "purified": (Target.purified(beta=4.0), (0, 1, 0.25, -0.25, 10.0)),
    "opsd": (Target.opsd(), (0, 0, 1, 0, None)),
    "beta-opsd on the base": (Target.beta_opsd(0.25), (0, 0.75, 0.25, 0, None)),
    "beta-opsd on the student": (Target.beta_opsd(0.25, "student"), (0.75, 0, 0.25, 0, None)),
    "wrong-reference contrast": (Target.contrast(0.5), (0, 0, 1.5, -0.5, None)),
    "pmi on the live student": (Target.live_student_pmi(beta=2.0, cap=5.0), (1, 0, 0.5, -0.5, 5.0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_published_targets_have_the_coefficients_of_the_table(name):
    target, (student, base, privileged, reference, cap) = TABLE[name]
    assert (target.student, target.base, target.privileged, target.reference) == (student, base, privileged, reference)
    assert target.cap == cap
    assert target.temperature == 1.0


def test_the_defaults_are_the_papers():
    assert Target.purified() == Target.purified(beta=1.0, cap=10.0, temperature=1.0)
    assert (Divergence().kind, Divergence().weight) == ("jsd", 0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Target.purified(beta=0.0), "set beta"),
        (lambda: Target.purified(beta=float("nan")), "set beta"),
        (lambda: Target.purified(cap=-1.0), "set cap"),
        (lambda: Target.purified(temperature=0.0), "set temperature"),
        (lambda: Target.purified(beta=-1.0), "set beta"),
        (lambda: Target.live_student_pmi(beta=0.0), "set beta"),
        (lambda: Target(student=1.0), "set base"),
        (lambda: Target(base=float("inf")), "set base"),
        (lambda: Target(base=1.0, temperature=-1.0), "set temperature"),
        (lambda: Target(base=1.0, cap=0.0), "set cap"),
        (lambda: Target(privileged=1.5, reference=-0.5, cap=10.0), "set reference"),
        (lambda: Target.beta_opsd(1.5), "set weight"),
        (lambda: Target.beta_opsd(0.5, "teacher"), "set anchor"),
        (lambda: Divergence("total_variation"), "set kind"),
        (lambda: Divergence("jsd", 0.0), "set weight"),
        (lambda: Divergence("jsd", 1.0), "set weight"),
    ],
)
def test_invalid_values_are_refused_by_name(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("name", TARGETS)
def test_the_pair_gives_the_logits_of_the_target(name):
    """Every target: log P = W·anchor + a_T·c·tanh(centred W·d / c) + a_S·log π_θ, up to a constant."""
    target = TARGETS[name]
    problem = make_problem(1)
    anchor, shift = vectors_of(problem, target)
    weight = problem.teacher_weight[: problem.vocab]
    got = torch.zeros(7, problem.vocab, dtype=torch.float64)
    if anchor is not None:
        got += anchor @ weight.T
    if shift is not None:
        raw = shift @ weight.T
        got += target.privileged * target.cap * torch.tanh((raw - raw.mean(-1, keepdim=True)) / target.cap)
        assert target.cap is not None
    want = target.base * problem.base @ weight.T
    difference = (problem.privileged - problem.reference) @ weight.T
    if target.cap is None:
        want = want + (target.privileged * problem.privileged + target.reference * problem.reference) @ weight.T
        assert shift is None
    else:
        centred = difference - difference.mean(-1, keepdim=True)
        want = want + target.privileged * target.cap * torch.tanh(centred / target.cap)
    torch.testing.assert_close(torch.log_softmax(got, -1), torch.log_softmax(want, -1))


def test_the_pair_is_computed_in_fp32_and_single_states_are_not_copied():
    problem = make_problem(2).to(torch.bfloat16)
    anchor, shift = vectors_of(problem, Target.purified())
    assert anchor.data_ptr() == problem.base.data_ptr()
    assert shift.dtype == torch.float32
    assert torch.equal(shift, problem.privileged.float() - problem.reference.float())
    folded, none = vectors_of(problem, Target.purified(2.0, None))
    assert none is None
    assert folded.dtype == torch.float32
    torch.testing.assert_close(folded, problem.base.float() + shift / 2)
    opsd, _ = hidden_pair(Target.opsd(), privileged=problem.privileged)
    assert opsd.data_ptr() == problem.privileged.data_ptr()


def test_the_inputs_of_the_pair_are_unchanged_and_the_pair_is_detached():
    problem = make_problem(3)
    before = [x.clone() for x in (problem.base, problem.privileged, problem.reference)]
    inputs = [x.requires_grad_() for x in (problem.base, problem.privileged, problem.reference)]
    for target in TARGETS.values():
        for vector in vectors_of(problem, target):
            assert vector is None or not vector.requires_grad
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_a_missing_branch_is_named():
    hidden = torch.zeros(2, 4)
    branches = dict.fromkeys(("base", "privileged", "reference"), hidden)
    for missing in branches:
        with pytest.raises(ValueError, match=f"needs the hidden states of {missing}"):
            hidden_pair(Target.purified(), **{**branches, missing: None})
    logits, shard = torch.zeros(2, 4), VocabShard(4, 4)
    with pytest.raises(ValueError, match="the logits of reference"):
        loss_from_logits(
            Branches(logits, base=logits, privileged=logits),
            target=Target.purified(),
            divergence=Divergence(),
            shard=shard,
        )
    loss_from_logits(Branches(logits, privileged=logits), target=Target.opsd(), divergence=Divergence(), shard=shard)
