"""The clip of vocabulary entries: official OPSD's later loss, its sign, and its limits.

`test_agreement` compares loss and gradients with the dense reference, on one shard and on several.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.functional import kl_div

from nemo_popsd.distillation import Divergence, Target
from nemo_popsd.distillation.config import DivergenceConfig
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.errors import UserError
from tests.distillation.calls import hidden_loss, with_
from tests.distillation.dense import dense, make_problem, relative


def test_official_opsd_by_its_definition():
    """KL(teacher ‖ student) at temperature 1.1, each entry at most 0.05, summed and divided by the number of tokens."""
    problem = make_problem(3, tokens=11, sharpness=0.5)
    problem = with_(problem, token_weights=torch.full((11,), 1 / 11, dtype=torch.float64))
    h, w = problem.student.clone().requires_grad_(), problem.student_weight.clone().requires_grad_()
    log_student = (h @ w[: problem.vocab].T / 1.1).log_softmax(-1)
    log_teacher = (problem.privileged @ problem.teacher_weight[: problem.vocab].T / 1.1).log_softmax(-1)
    entries = kl_div(log_student, log_teacher, reduction="none", log_target=True)
    assert 0.01 < (entries > 0.05).double().mean() < 0.5
    loss = entries.clamp(max=0.05).sum() / 11
    loss.backward()
    result, hidden, weight = hidden_loss(problem, Target.opsd(1.1), Divergence("forward_kl", clip=0.05))
    result.total.backward()
    torch.testing.assert_close(result.total, loss)
    assert relative(hidden.grad, h.grad) < 1e-10
    assert relative(weight.grad, w.grad) < 1e-10


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_a_clip_above_every_entry_changes_nothing(kind):
    problem = make_problem(4)
    seen = []
    for clip in (None, 1e3):
        result, hidden, weight = hidden_loss(problem, Target.purified(), Divergence(kind, 0.3, clip))
        result.total.backward()
        seen.append((result.per_token, hidden.grad, weight.grad))
    assert max(relative(clipped, plain) for plain, clipped in zip(*seen, strict=True)) < 1e-10


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_a_clipped_kl_may_be_negative_and_a_clipped_jsd_is_not(kind):
    """The reason for the default (no clip): the smaller the clip, the more the negative entries dominate."""
    problem, divergence = make_problem(5), Divergence(kind, 0.3, clip=1e-4)
    result, _, _ = hidden_loss(problem, Target.opsd(), divergence)
    assert relative(result.per_token, dense(problem, Target.opsd(), divergence).loss) < 1e-10
    assert result.per_token.max() < 0 if kind != "jsd" else result.per_token.min() > 0
    plain, _, _ = hidden_loss(problem, Target.opsd(), Divergence(kind, 0.3))
    assert plain.per_token.min() > 0


def test_a_clip_is_refused_or_reported(caplog):
    with pytest.raises(UserError, match="clip=0"):
        Divergence(clip=0.0)
    with pytest.raises(UserError, match=r"distillation\.divergence\.clip"):
        DivergenceConfig(clip=-1.0)
    with caplog.at_level(logging.WARNING):
        assert build_divergence(DivergenceConfig()) == Divergence()
        assert build_divergence(DivergenceConfig(clip=0.05)).clip == 0.05
        assert not caplog.records
        assert build_divergence(DivergenceConfig(kind="forward_kl", clip=0.05)).clip == 0.05
    assert [r.name for r in caplog.records] == ["nemo_popsd.distillation.divergence"]
    assert "the loss may become negative" in caplog.text
