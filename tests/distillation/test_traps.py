"""One test for each known way to get this loss wrong; numbers as in the method's list of traps."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.distributed as dist

from nemo_popsd import distillation
from nemo_popsd.distillation import Divergence, Target, loss_from_logits
from nemo_popsd.parallel.vocabulary import VocabShard, mean_output_vector
from tests.distillation.calls import DIVERGENCES, TARGETS, hidden_loss, logits_loss, vectors_of
from tests.distillation.dense import dense, make_problem, relative
from tests.harness import run_ranks

FORWARD = Divergence("forward_kl")


def implied_target(problem, target, *, form: str, group=None) -> torch.Tensor:
    """P as the loss uses it: the gradient of KL(P ‖ p) with respect to the student's logits is (p − P)/τ.

    Needs H = V_pad and an identity as student matrix, so that hidden states are logits.
    """
    ones = torch.ones_like(problem.token_weights)
    problem = type(problem)(**{**vars(problem), "token_weights": ones})
    if form == "hidden":
        result, hidden, _ = hidden_loss(problem, target, FORWARD, group, dw=False)
        result.total.backward()
        gradient = hidden.grad
    else:
        loss, logits = logits_loss(problem, target, FORWARD, group)
        loss.sum().backward()
        gradient = logits.grad
    p = torch.softmax(problem.student[:, : problem.vocab] / target.temperature, -1)
    return p - gradient[:, : problem.vocab] * target.temperature


def square_problem(seed: int, vocab: int = 20, padded: int = 24, **settings):
    """Hidden size = padded vocabulary, and the student's matrix the identity."""
    problem = make_problem(seed, hidden=padded, vocab=vocab, padded=padded, **settings)
    return type(problem)(**{**vars(problem), "student_weight": torch.eye(padded, dtype=torch.float64)})


# --- Trap 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("junk", [0.0, 5.0, float("nan")], ids=["zeros", "large", "nan"])
def test_trap_1_padding_has_no_probability_does_not_enter_the_mean_and_gets_no_gradient(form, junk):
    """Whatever the padding contains, the result is that of the true entries; unmasked zeros would take probability."""
    padded, bare = make_problem(1, vocab=20, padded=32, junk=junk), make_problem(1, vocab=20, padded=32)
    bare = type(bare)(
        **{**vars(bare), "student_weight": padded.student_weight[:20], "teacher_weight": padded.teacher_weight[:20]}
    )
    zeros_leak = torch.log_softmax(bare.base @ torch.cat((bare.teacher_weight, torch.zeros(12, 8))).T, -1)
    assert zeros_leak.exp()[:, 20:].sum(-1).max() > 1e-2  # the trap is real on this problem
    for target in (TARGETS["purified, cap 1, beta 3"], TARGETS["everything"]):
        for divergence in DIVERGENCES.values():
            if form == "hidden":
                got, got_h, got_w = hidden_loss(padded, target, divergence)
                want, want_h, want_w = hidden_loss(bare, target, divergence)
                got.total.backward()
                want.total.backward()
                torch.testing.assert_close(got.per_token, want.per_token, rtol=1e-12, atol=0)
                torch.testing.assert_close(got_h.grad, want_h.grad, rtol=1e-10, atol=1e-15)
                torch.testing.assert_close(got_w.grad[:20], want_w.grad, rtol=1e-10, atol=1e-15)
                assert got_w.grad[20:].count_nonzero() == 0
            else:
                got, got_z = logits_loss(padded, target, divergence)
                want, want_z = logits_loss(bare, target, divergence)
                got.sum().backward()
                want.sum().backward()
                torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
                torch.testing.assert_close(got_z.grad[:, :20], want_z.grad, rtol=1e-10, atol=1e-15)
                assert got_z.grad[:, 20:].count_nonzero() == 0


def test_trap_1_the_mean_output_vector_is_over_the_true_vocabulary():
    problem = make_problem(2, vocab=20, padded=32, junk=100.0)
    mean = mean_output_vector(problem.teacher_weight, VocabShard(20, 32))
    torch.testing.assert_close(mean, problem.teacher_weight[:20].mean(0))


# --- Trap 2 -----------------------------------------------------------------------------------------------------------


def tail_problem():
    """Entry 3 is unlikely for the base, and the question raises it by more than the cap."""
    problem = square_problem(3, vocab=24)
    tensors = vars(problem).copy()
    tensors["teacher_weight"] = torch.eye(24, dtype=torch.float64)
    tensors["base"] = problem.base.clone()
    tensors["base"][:, 3] = -13.0
    tensors["privileged"] = problem.reference.clone()
    tensors["privileged"][:, 3] += 200.0
    return type(problem)(**tensors)


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_trap_2_the_tail_is_raised_by_e_to_the_c_over_beta_to_fp32_accuracy(form):
    target = Target.purified()
    problem = tail_problem()
    want = dense(problem, target, FORWARD).q
    base = torch.softmax(problem.base, -1)
    # Relative to entry 0, whose centred difference is −200/24, entry 3 gains about e^{c(1 + tanh(200/240))}.
    gain = (want[:, 3] / base[:, 3]) / (want[:, 0] / base[:, 0])
    assert gain.min() > 2.2e4
    single = problem.to(torch.float32)
    got = implied_target(single, target, form=form).double()
    assert (got - want).abs().sum(-1).max() / 2 < 1e-5


def test_trap_2_bf16_log_probabilities_are_not_enough():
    """The same target from log-probabilities in bf16 is a thousand times outside of the limit above."""
    problem = tail_problem()
    want = dense(problem, Target.purified(), FORWARD).q
    teacher, reference, base = (
        torch.log_softmax(x, -1).bfloat16() for x in (problem.privileged, problem.reference, problem.base)
    )
    delta = teacher - reference
    delta = 10 * torch.tanh((delta - delta.mean(-1, keepdim=True)) / 10)
    rounded = torch.softmax((base + delta).double(), -1)
    assert (rounded - want).abs().sum(-1).max() / 2 > 1e-2


def test_trap_2_the_target_from_bf16_states_is_at_least_as_good_as_from_bf16_logits():
    """Total variation against float64 on the same bf16 states and matrix: summing vectors beats subtracting logits."""
    problem = make_problem(10, tokens=64, hidden=64, vocab=1000, padded=1000, sharpness=0.4)
    near = {name: problem.base + 0.3 * getattr(problem, name) for name in ("privileged", "reference")}
    problem = type(problem)(**{**vars(problem), **near}).to(torch.bfloat16)
    target, divergence = Target.purified(), FORWARD
    exact = dense(problem, target, divergence).q

    def capped(delta):
        return target.cap * torch.tanh((delta - delta.mean(-1, keepdim=True)) / target.cap)

    def error(q):
        return (q - exact).abs().sum(-1) / 2

    teacher, reference, base = (
        (x @ problem.teacher_weight.T).double() for x in (problem.privileged, problem.reference, problem.base)
    )
    from_logits = error(torch.softmax(base + capped(teacher - reference), -1))
    # As the loss forms it on a CPU, with products rounded to bf16 (a GPU keeps them in fp32).
    pair = vectors_of(problem, target)
    products = [(x.bfloat16() @ problem.teacher_weight.T).double() for x in (pair.anchor, pair.shift)]
    rounded = error(torch.softmax(products[0] + capped(products[1]), -1))
    result, _, _ = hidden_loss(problem, target, divergence, token_weights=None)
    entropy = -(exact * exact.log()).sum(-1)
    print(f"total variation: {rounded.mean():.1e} against {from_logits.mean():.1e} from logits")
    assert rounded.mean() <= from_logits.mean()
    assert rounded.max() <= from_logits.max()
    assert relative(result.statistics["target_entropy"], entropy) < 2e-2


# --- Trap 3 -----------------------------------------------------------------------------------------------------------


def _raw_all_reduce(x: torch.Tensor, group) -> torch.Tensor:
    """The planted fault: a sum whose backward in autograd is the identity."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def _errors_of_logits_form(rank, size, problem, divergence) -> tuple[float, float]:
    target = Target.purified(0.8, 3.0, 1.2)
    want = dense(problem, target, divergence)
    loss, logits = logits_loss(problem.shard(rank, size), target, divergence, dist.group.WORLD)
    (loss * problem.token_weights).sum().backward()
    width = logits.shape[1]
    return relative(loss.detach(), want.loss), relative(logits.grad, want.dz[:, rank * width : (rank + 1) * width])


def _errors_of_hidden_form(rank, size, problem, divergence) -> tuple[float, float]:
    target = Target.purified(0.8, 3.0, 1.2)
    want = dense(problem, target, divergence)
    result, hidden, _ = hidden_loss(problem.shard(rank, size), target, divergence, dist.group.WORLD)
    result.total.backward()
    return relative(result.per_token, want.loss), relative(hidden.grad, want.dh)


def _plant_raw_all_reduces(rank: int, world_size: int):
    from nemo_popsd.distillation import definition, divergence, hidden
    from nemo_popsd.parallel.collectives import sum_for_replicas, sum_for_shards

    warnings.simplefilter("ignore")  # recent versions of torch warn of the raw all-reduce
    problem = make_problem(4)
    found = {}
    for name, kind in DIVERGENCES.items():
        found[name, "logits, as built"] = _errors_of_logits_form(rank, world_size, problem, kind)
        found[name, "hidden, as built"] = _errors_of_hidden_form(rank, world_size, problem, kind)

        definition.sum_for_shards = _raw_all_reduce
        divergence.sum_for_replicas = _raw_all_reduce
        found[name, "logits, raw all-reduce"] = _errors_of_logits_form(rank, world_size, problem, kind)
        definition.sum_for_shards = sum_for_replicas
        divergence.sum_for_replicas = sum_for_replicas
        found[name, "logits, identity adjoint of the softmax sum"] = _errors_of_logits_form(
            rank, world_size, problem, kind
        )
        definition.sum_for_shards = sum_for_shards
        divergence.sum_for_replicas = sum_for_shards
        found[name, "logits, summing adjoint of the loss"] = _errors_of_logits_form(rank, world_size, problem, kind)
        divergence.sum_for_replicas = sum_for_replicas

        reduce_sum_ = hidden.reduce_sum_
        hidden.reduce_sum_ = lambda x, group: x
        found[name, "hidden, dh not summed"] = _errors_of_hidden_form(rank, world_size, problem, kind)
        hidden.reduce_sum_ = reduce_sum_
    return found


@pytest.mark.slow
def test_trap_3_a_planted_raw_all_reduce_keeps_the_loss_and_fails_the_gradient_comparison():
    for found in run_ranks(_plant_raw_all_reduces, 2):
        for (divergence, plant), (loss, gradient) in found.items():
            assert loss < 1e-10, (divergence, plant, loss)
            if plant.endswith("as built"):
                assert gradient < 1e-10, (divergence, plant, gradient)
            else:
                assert gradient > 1e-2, (divergence, plant, gradient)


# --- Trap 10 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_trap_10_the_temperature_of_the_loss_divides_all_four_distributions_alike(form):
    """With τ on h equals τ = 1 on h/τ for all four distributions; the gradient carries one 1/τ."""
    tau = 1.7
    problem = make_problem(5)
    scaled = type(problem)(
        **{**vars(problem), **{n: getattr(problem, n) / tau for n in ("student", "base", "privileged", "reference")}}
    )
    for divergence in DIVERGENCES.values():
        warm, plain = Target.purified(0.8, 3.0, tau), Target.purified(0.8, 3.0, 1.0)
        if form == "hidden":
            got, got_h, got_w = hidden_loss(problem, warm, divergence)
            want, want_h, want_w = hidden_loss(scaled, plain, divergence)
            got.total.backward()
            want.total.backward()
            torch.testing.assert_close(got.total, want.total)
            torch.testing.assert_close(got_h.grad, want_h.grad / tau)
            torch.testing.assert_close(got_w.grad, want_w.grad)
        else:
            got, got_z = logits_loss(problem, warm, divergence)
            want, want_z = logits_loss(scaled, plain, divergence)
            got.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(got_z.grad, want_z.grad / tau)


def test_trap_10_no_entry_point_has_sampling_arguments():
    for function in (distillation.loss_from_hidden, loss_from_logits, Target):
        for name in inspect.signature(function).parameters:
            assert not name.startswith(("top_", "sampl", "rollout")), (function, name)


# --- Trap 11 (as far as it is mathematics) ----------------------------------------------------------------------------


def _poison_one_rank(rank: int, world_size: int):
    found = {}
    for poison in (float("nan"), float("inf")):
        for name, divergence in DIVERGENCES.items():
            for which in ("student_weight", "teacher_weight"):
                mine = make_problem(6).to(torch.float32).shard(rank, world_size)
                if rank == 1:
                    getattr(mine, which)[2, :] = poison
                result, _, _ = hidden_loss(mine, Target.purified(), divergence, dist.group.WORLD)
                found[poison, name, which] = (result.total.item(), result.per_token)
    return found


def test_trap_11_a_non_finite_weight_on_one_rank_makes_the_loss_of_every_rank_non_finite():
    """Neither a maximum nor the clamp of the log-ratio may hide it."""
    by_rank = run_ranks(_poison_one_rank, 2)
    for found in by_rank:
        for case, (total, per_token) in found.items():
            assert total != total or abs(total) == float("inf"), (case, total)
            assert not per_token.isfinite().any(), case


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_trap_11_a_token_that_is_not_finite_leaves_its_neighbours_unchanged(divergence):
    """The trainer names rows by their per-token losses: those of the other tokens do not change."""
    clean = make_problem(7)
    want, _, _ = hidden_loss(clean, Target.purified(), divergence)
    for field in ("student", "base", "privileged", "reference"):
        hidden = getattr(clean, field).clone()
        hidden[4, 1] = float("nan")
        got, _, _ = hidden_loss(type(clean)(**{**vars(clean), field: hidden}), Target.purified(), divergence)
        assert got.per_token.isnan().tolist() == [token == 4 for token in range(7)]
        torch.testing.assert_close(got.per_token[:4], want.per_token[:4])
        assert got.total.isnan()


def test_extreme_but_finite_logits_give_finite_losses_and_gradients():
    """Log-ratios far beyond exp's range, in both directions."""
    problem = make_problem(8, sharpness=60.0).to(torch.float32)
    for target in (TARGETS["purified"], TARGETS["opsd"], TARGETS["contrast"]):
        for divergence in DIVERGENCES.values():
            result, hidden, weight = hidden_loss(problem, target, divergence)
            result.total.backward()
            for tensor in (result.per_token, hidden.grad, weight.grad):
                assert tensor.isfinite().all(), (target, divergence)
            if divergence.kind == "jsd":
                assert result.per_token.max() <= 0.7
                assert result.per_token.min() >= 0


# --- Trap 13 ----------------------------------------------------------------------------------------------------------


def test_trap_13_the_gradient_of_the_matrix_is_summed_in_fp32_and_rounded_once():
    """bf16 inputs, 128 chunks: the same gradient with its chunks added in bf16 is far worse."""
    problem = make_problem(9, tokens=512, hidden=16, vocab=60, padded=64, sharpness=0.3).to(torch.bfloat16)
    problem = type(problem)(**{**vars(problem), "token_weights": problem.token_weights.float()})
    target, divergence = Target.purified(), Divergence()
    exact = dense(problem, target, divergence).dw

    def error(gradient: torch.Tensor) -> float:
        return ((gradient.double() - exact).norm() / exact.norm()).item()

    result, _, weight = hidden_loss(problem, target, divergence, chunk_tokens=4)
    result.total.backward()
    assert weight.grad.dtype == torch.bfloat16
    in_bf16 = torch.zeros_like(weight.grad)
    per_token = ("student", "base", "privileged", "reference", "token_weights")
    for start in range(0, 512, 4):
        rows = {name: getattr(problem, name)[start : start + 4] for name in per_token}
        part, _, part_weight = hidden_loss(type(problem)(**{**vars(problem), **rows}), target, divergence)
        part.total.backward()
        in_bf16 += part_weight.grad
    print(f"dW error: fp32 sum {error(weight.grad):.2e}, bf16 sum {error(in_bf16):.2e}")
    assert error(weight.grad) < 4e-3
    assert error(in_bf16) > 4 * error(weight.grad)
