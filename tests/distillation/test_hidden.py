"""The contract of the chunked form apart from its values: valid calls, and where gradients are accumulated."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_popsd.distillation import (
    Branches,
    Divergence,
    MainGradient,
    Target,
    loss_from_hidden,
    loss_from_logits,
)
from nemo_popsd.errors import UserError
from tests.distillation.calls import DIVERGENCES, TARGETS, hidden_loss, vectors_of, with_
from tests.distillation.dense import dense, make_problem, relative

JSD, FORWARD, REVERSE = Divergence(), Divergence("forward_kl"), Divergence("reverse_kl")


# --- Contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_package_needs_only_torch():
    """In a fresh process, the import loads neither Megatron nor NeMo nor anything built on them."""
    program = (
        "import sys\n"
        "from nemo_popsd.distillation import *\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'megatron', 'nemo', 'lightning', 'pytorch_lightning', 'transformers', 'omegaconf'}))\n"
        "print(sorted(n for n in sys.modules if n.startswith('nemo_popsd.') and 'distillation' not in n))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[]",
        "['nemo_popsd.errors', 'nemo_popsd.parallel', 'nemo_popsd.parallel.collectives', "
        "'nemo_popsd.parallel.vocabulary']",
    ]


def test_an_upstream_scalar_scales_both_gradients_and_backward_can_run_again():
    problem = make_problem(1)
    want = dense(problem, Target.purified(), JSD)
    result, hidden, weight = hidden_loss(problem, Target.purified(), JSD)
    (2.5 * result.total).backward(retain_graph=True)
    assert relative(hidden.grad, 2.5 * want.dh) < 1e-10
    assert relative(weight.grad, 2.5 * want.dw) < 1e-10
    (-result.total).backward()
    assert relative(hidden.grad, 1.5 * want.dh) < 1e-10
    assert relative(weight.grad, 1.5 * want.dw) < 1e-10


def test_the_total_is_the_weighted_sum_and_the_rest_has_no_gradient():
    problem = make_problem(2)
    result, _, _ = hidden_loss(problem, Target.purified(), JSD)
    torch.testing.assert_close(result.total, (result.per_token * problem.token_weights).sum())
    plain, hidden, weight = hidden_loss(problem, Target.purified(), JSD, token_weights=None)
    torch.testing.assert_close(plain.total, result.per_token.sum())
    plain.total.backward()
    want = dense(with_(problem, token_weights=torch.ones(7, dtype=torch.float64)), Target.purified(), JSD)
    assert relative(hidden.grad, want.dh) < 1e-10
    assert relative(weight.grad, want.dw) < 1e-10
    assert result.total.requires_grad
    for tensor in (result.per_token, result.statistics.values):
        assert not tensor.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        result.per_token.sum().backward()


def test_wrong_uses_are_refused_by_name():
    problem = make_problem(3)
    with pytest.raises(ValueError, match="token_weights requires grad"):
        hidden_loss(problem, Target.purified(), JSD, token_weights=torch.ones(7, requires_grad=True))
    with pytest.raises(ValueError, match=r"token_weights has shape \(6,\)"):
        hidden_loss(problem, Target.purified(), JSD, token_weights=torch.ones(6))
    with pytest.raises(ValueError, match="chunk_tokens"):
        hidden_loss(problem, Target.purified(), JSD, chunk_tokens=0)
    with pytest.raises(UserError, match="vocab_size=33"):
        hidden_loss(with_(problem, vocab=33), Target.purified(), JSD)
    with pytest.raises(ValueError, match="float16"):
        hidden_loss(problem.to(torch.float16), Target.purified(), JSD)
    with pytest.raises(ValueError, match="teacher_weight has shape"):
        hidden_loss(with_(problem, teacher_weight=problem.teacher_weight[:-1]), Target.purified(), JSD)
    pair = vectors_of(problem, Target.purified())
    for target, message in (
        (Target.purified(cap=None), "vectors.shift must not be given"),
        (Target.live_student_pmi(), "vectors.anchor must not be given"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_from_hidden(
                problem.student,
                problem.student_weight,
                pair,
                problem.teacher_weight,
                target=target,
                divergence=JSD,
                shard=problem.vocab_shard(),
            )
    with pytest.raises(ValueError, match=r"vectors\.shift must be given"):
        loss_from_hidden(
            problem.student,
            problem.student_weight,
            pair._replace(shift=None),
            problem.teacher_weight,
            target=Target.purified(),
            divergence=JSD,
            shard=problem.vocab_shard(),
        )


def test_inputs_are_not_written_to():
    problem = make_problem(4)
    before = make_problem(4)
    for target in TARGETS.values():
        for divergence in DIVERGENCES.values():
            result, _, _ = hidden_loss(problem, target, divergence)
            result.total.backward()
    for name, value in vars(before).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(problem, name)), name


def test_autocast_does_not_lower_the_precision():
    problem = make_problem(5).to(torch.float32)
    want, want_h, want_w = hidden_loss(problem, Target.purified(), JSD)
    want.total.backward()
    frozen = {name: getattr(problem, name) @ problem.teacher_weight.T for name in ("base", "privileged", "reference")}
    logits = Branches(problem.student @ problem.student_weight.T, **frozen)
    settings = {"target": Target.purified(), "divergence": JSD, "shard": problem.vocab_shard()}
    plain = loss_from_logits(logits, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_h, got_w = hidden_loss(problem, Target.purified(), JSD)
        got.total.backward()
        torch.testing.assert_close(loss_from_logits(logits, **settings), plain, rtol=0, atol=0)
    assert torch.equal(got.per_token, want.per_token)
    assert torch.equal(got_h.grad, want_h.grad)
    assert torch.equal(got_w.grad, want_w.grad)


def test_bf16_inputs_give_bf16_gradients_and_fp32_losses():
    problem = make_problem(6, tokens=32, hidden=16, sharpness=0.4).to(torch.bfloat16)
    problem = with_(problem, token_weights=problem.token_weights.float())
    for target in (Target.purified(), Target.live_student_pmi(), Target.opsd()):
        for divergence in DIVERGENCES.values():
            want = dense(problem, target, divergence)
            result, hidden, weight = hidden_loss(problem, target, divergence)
            result.total.backward()
            assert (result.per_token.dtype, result.total.dtype) == (torch.float32, torch.float32)
            assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
            assert relative(result.per_token, want.loss) < 3e-2
            if divergence.clip is None:  # rounding may move an entry across the clip, where its gradient jumps to 0
                assert relative(hidden.grad, want.dh) < 3e-2
                assert relative(weight.grad, want.dw) < 3e-2


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_no_tokens_give_a_loss_of_0_with_a_graph(divergence):
    problem = make_problem(7, tokens=0)
    result, hidden, weight = hidden_loss(problem, Target.purified(), divergence)
    assert result.total.item() == 0
    assert result.per_token.shape == (0,)
    assert result.statistics["forward_kl"].shape == (0,)
    result.total.backward()
    assert hidden.grad.shape == (0, 8)
    assert weight.grad.shape == (32, 8)
    assert weight.grad.count_nonzero() == 0


def test_the_jsd_is_accurate_in_fp32_where_student_and_target_almost_agree():
    """A JSD of 1e-7, as at the start of training, is smaller than first-order rounding errors."""
    near = make_problem(16, tokens=20, hidden=16, vocab=120, padded=128)
    near = with_(
        near,
        student=near.base + 1e-3 * near.student,
        privileged=near.reference + 1e-3 * near.privileged,
        student_weight=near.teacher_weight,
        token_weights=torch.ones(20, dtype=torch.float64),
    ).to(torch.float32)
    for divergence in (Divergence("jsd", 0.5), Divergence("jsd", 0.3)):
        want = dense(near, Target.purified(), divergence)
        assert 1e-8 < want.loss.mean() < 1e-5
        result, hidden, _ = hidden_loss(near, Target.purified(), divergence)
        result.total.backward()
        errors = (result.per_token.double() - want.loss).abs() / want.loss
        print(f"relative error of a JSD of {want.loss.mean():.1e}: {errors.max():.1e}")
        assert errors.max() < 1e-2
        assert relative(hidden.grad, want.dh) < 1e-2


# --- A gradient buffer of the trainer ---------------------------------------------------------------------------------


def test_the_gradient_is_added_to_the_trainers_buffer():
    """The buffer keeps its content; the stated scale is applied; autograd receives no gradient, or zeros for hooks."""
    problem = make_problem(18)
    want = dense(problem, Target.purified(), JSD)
    for placeholder in (False, True):
        kept = torch.full((32, 8), 0.5, dtype=torch.float64)
        main = MainGradient(kept, 2.5, placeholder)
        result, hidden, weight = hidden_loss(problem, Target.purified(), JSD, main_gradient=main)
        (2.5 * result.total).backward()
        assert relative(kept - 0.5, 2.5 * want.dw) < 1e-10
        assert relative(hidden.grad, 2.5 * want.dh) < 1e-10
        assert kept[29:].eq(0.5).all()
        if placeholder:
            assert weight.grad.shape == (32, 8)
            assert weight.grad.count_nonzero() == 0
        else:
            assert weight.grad is None


def test_a_second_use_of_the_weight_gets_its_gradient_through_autograd():
    """Tied embeddings: the trainer's buffer receives the gradient of the loss, autograd that of the embedding."""
    problem = make_problem(19)
    for placeholder in (False, True):
        kept = torch.zeros(32, 8, dtype=torch.float64)
        weight = problem.student_weight.clone().requires_grad_()
        pair = vectors_of(problem, Target.purified())
        result = loss_from_hidden(
            weight[:7] * 2,
            weight,
            pair,
            problem.teacher_weight,
            target=Target.purified(),
            divergence=JSD,
            shard=problem.vocab_shard(),
            token_weights=problem.token_weights,
            main_gradient=MainGradient(kept, 1.0, placeholder),
        )
        result.total.backward()
        want = dense(with_(problem, student=problem.student_weight[:7] * 2), Target.purified(), JSD)
        assert relative(kept, want.dw) < 1e-10
        assert relative(weight.grad[:7], 2 * want.dh) < 1e-10
        assert weight.grad[7:].count_nonzero() == 0


def test_a_backward_pass_with_another_scale_is_refused():
    problem = make_problem(20)

    def main(dtype=torch.float64, rows: int = 32):
        return MainGradient(torch.zeros(rows, 8, dtype=dtype), 2.0)

    result, _, _ = hidden_loss(problem, Target.purified(), JSD, main_gradient=main())
    with pytest.raises(RuntimeError, match=r"main_gradient.upstream=2.0"):
        result.total.backward()
    result, _, _ = hidden_loss(problem, Target.purified(), JSD, main_gradient=main())
    (result.total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        (result.total * 2).backward()
    for wrong in (main(torch.float32), main(rows=29)):
        with pytest.raises(ValueError, match="main_gradient is"):
            hidden_loss(problem, Target.purified(), JSD, main_gradient=wrong)


def test_a_frozen_weight_does_not_change_the_trainers_buffer():
    kept = torch.zeros(32, 8, dtype=torch.float64)
    result, _, _ = hidden_loss(
        make_problem(21), Target.purified(), JSD, dw=False, main_gradient=MainGradient(kept, 3.0)
    )
    result.total.backward()
    assert kept.count_nonzero() == 0
