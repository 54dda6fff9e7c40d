"""Every family is one record of coefficients; a new family or statistic needs only its declaration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.distillation import Divergence, Target
from nemo_popsd.distillation.config import DistillationConfig, TargetConfig
from nemo_popsd.distillation.target_families import FAMILIES, Family, build_target
from nemo_popsd.errors import UserError
from nemo_popsd.planning.workload import frozen_branches
from tests.distillation.calls import TARGETS, hidden_loss, vectors_of
from tests.distillation.dense import dense, make_problem, relative

MEMBERS = {
    "purified": ((0, 1, 0.5, -0.5), Borrowed.NONE, ("base", "privileged", "reference")),
    "opsd": ((0, 0, 1, 0), Borrowed.NONE, ("privileged",)),
    "beta_opsd": ((0, 0.75, 0.25, 0), Borrowed.NONE, ("base", "privileged")),
    "student_pmi": ((1, 0, 0.5, -0.5), Borrowed.NONE, ("privileged", "reference")),
    "reference_free": ((0, 0, 1, 0), Borrowed.NONE, ("privileged",)),
    "other_reference": ((0, 0, 1, 0), Borrowed.PRIVILEGED, ("privileged",)),
    "wrong_reference": ((0, 0, 1.5, -0.5), Borrowed.SECOND, ("privileged", "reference")),
}


def test_every_family_is_listed_here() -> None:
    assert set(MEMBERS) == set(FAMILIES)


@pytest.mark.parametrize("family", MEMBERS)
def test_a_family_is_its_coefficients_contexts_and_branches(family: str) -> None:
    config = TargetConfig(family=family, beta=2.0, weight=0.25, alpha=0.5, cap=7.0, temperature=1.25)
    target = build_target(config)
    coefficients, borrowed, branches = MEMBERS[family]
    assert (target.student, target.base, target.privileged, target.reference) == coefficients
    assert target.cap == (7.0 if family in ("purified", "student_pmi") else None)
    assert target.temperature == 1.25
    assert Borrowed(config.borrowed) is borrowed
    assert target.frozen_branches() == branches
    assert {"privileged", "reference"} <= set(target.frozen_branches(diagnosed=True))
    assert FAMILIES[family].view == ("none" if family == "reference_free" else None)
    assert FAMILIES[family].same_prefix is (family in ("purified", "student_pmi"))


@pytest.mark.parametrize("family", MEMBERS)
def test_the_settings_that_a_family_lists_are_those_that_it_reads(family: str) -> None:
    changed = {"beta": 3.0, "cap": 2.0, "weight": 0.75, "alpha": 2.0}
    default = build_target(TargetConfig(family=family))
    read = {n for n, value in changed.items() if build_target(TargetConfig(family=family, **{n: value})) != default}
    assert read == set(FAMILIES[family].settings)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_states_the_vectors_that_the_loss_gets(name: str) -> None:
    """The quantities that the planner reads: number of vectors, and their bytes beyond the branches' states in bf16."""
    target = TARGETS[name]
    problem = make_problem(1).to(torch.bfloat16)
    vectors = [x for x in vectors_of(problem, target) if x is not None]
    branches = {x.data_ptr() for x in (problem.base, problem.privileged, problem.reference)}
    assert target.vectors == len(vectors)
    assert target.vector_bytes(2) == sum(x.element_size() for x in vectors)
    assert target.summed_bytes == sum(x.element_size() for x in vectors if x.data_ptr() not in branches)


def test_a_new_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/extending.md, "A new target family": configuration, loss, planner and diagnosis use the entry."""
    from tests.diagnosis.test_tokens import TOKENS, diagnosed

    monkeypatch.setitem(
        FAMILIES,
        "half_base",
        Family(
            summary="Purified OPSD with half of the base",
            target=lambda config: Target(
                base=0.5,
                privileged=1 / config.beta,
                reference=-1 / config.beta,
                cap=config.cap,
                temperature=config.temperature,
            ),
            settings=("beta", "cap"),
        ),
    )
    config = TargetConfig(family="half_base", beta=2.0, cap=3.0)
    with pytest.raises(UserError, match="half_base"):
        TargetConfig(family="half_bas")
    target, divergence = build_target(config), Divergence()
    problem = make_problem(2)
    want = dense(problem, target, divergence)
    result, hidden, weight = hidden_loss(problem, target, divergence)
    result.total.backward()
    assert relative(result.per_token, want.loss) < 1e-10
    assert relative(hidden.grad, want.dh) < 1e-10
    assert relative(weight.grad, want.dw) < 1e-10
    found, _, _ = diagnosed(problem, target)
    assert relative(found.columns()["log_target"], want.q.log().gather(1, TOKENS[:, None]).squeeze(1)) < 1e-10
    assert frozen_branches(DistillationConfig(target=config)) == ("base", "privileged", "reference")
    assert target.summed_bytes == 8  # half of h_0 and d, both fp32


@pytest.mark.slow
def test_a_new_statistic_is_one_declaration() -> None:
    """In a fresh process, since metrics, report and diagnosis read the declarations when they are imported."""
    program = """
from nemo_popsd.distillation import statistics
statistics.TOKEN_STATISTICS += (
    statistics.TokenStatistic(
        name="jeffreys", symbol="J(student, target)", unit="nats per token", meaning="both KLs",
        definition=lambda log_p, log_q: (log_q.exp() - log_p.exp()) * (log_q - log_p),
        closed_form=lambda stats: stats.forward_kl + stats.reverse_kl,
    ),
)
import torch
from nemo_popsd.diagnosis.groups import MEASURES
from nemo_popsd.distillation import Divergence, Target
from nemo_popsd.observability.metrics import DECLARED
from nemo_popsd.report.decomposition import _BY_GROUP, _NAMES
from nemo_popsd.report.sections import CURVES
from nemo_popsd.report.tokens import _INSPECTED
from tests.diagnosis.test_tokens import diagnosed
from tests.distillation.calls import DIVERGENCES, hidden_loss
from tests.distillation.dense import make_problem
problem, target = make_problem(3), Target.purified()
by_definition, _, _ = diagnosed(problem, target)
for divergence in DIVERGENCES.values():
    result, _, _ = hidden_loss(problem, target, divergence)
    values = result.statistics
    torch.testing.assert_close(values["jeffreys"], values["forward_kl"] + values["reverse_kl"])
    torch.testing.assert_close(values["jeffreys"], by_definition.columns()["jeffreys"])
assert "jeffreys" in [statistic.name for statistic in DECLARED]
assert CURVES["jeffreys"] == ("J(student, target)", "nats per token")
assert all("jeffreys" in names for names in (MEASURES, _BY_GROUP, _NAMES, _INSPECTED))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
