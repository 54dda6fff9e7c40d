"""Compiled kernels: same values as uncompiled ones, one compilation for all sizes, a fallback."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.distillation import Divergence, Target, fusion
from nemo_popsd.errors import UserError
from tests.distillation.calls import diagnosed, hidden_loss
from tests.distillation.dense import dense, make_problem, relative
from tests.harness import run_ranks

TARGET = Target.purified(0.7, 2.0, 1.3)
KINDS = {"jsd": Divergence("jsd", 0.3), "forward": Divergence("forward_kl"), "reverse": Divergence("reverse_kl")}

CLIPPED = {f"{kind}, clip": replace(divergence, clip=0.01) for kind, divergence in KINDS.items()}


def errors_of_fused(problem, mine, target, divergence, group=None, **settings) -> list[float]:
    want = dense(problem, target, divergence)
    result, hidden, weight = hidden_loss(mine, target, divergence, group, fused="always", **settings)
    result.total.backward()
    width = weight.shape[0]
    rows = slice(0, width) if group is None else slice(group.rank() * width, (group.rank() + 1) * width)
    return [
        relative(result.per_token, want.loss),
        relative(hidden.grad, want.dh),
        relative(weight.grad, want.dw[rows]),
        relative(result.statistics["target_entropy"], -(want.q * want.q.log()).sum(-1)),
    ]


@pytest.mark.slow
def test_fused_agrees_with_the_dense_reference_and_compiles_once_for_all_sizes():
    """Tiles of several sizes, including shorter last tiles and single tokens; new sizes do not trigger compilation."""
    from torch._dynamo.utils import counters

    counters.clear()
    found = {}
    problem = make_problem(1, tokens=23, hidden=16, vocab=300, padded=320, sharpness=0.5).to(torch.float32)
    for kind, divergence in (KINDS | CLIPPED).items():
        found[kind] = errors_of_fused(problem, problem, TARGET, divergence, chunk_tokens=11)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 9  # one for each step
    for tokens, vocab, chunk in ((40, 500, 13), (9, 77, 4)):
        problem = make_problem(2, tokens=tokens, hidden=12, vocab=vocab, padded=512, sharpness=0.5).to(torch.float32)
        for kind, divergence in (KINDS | CLIPPED).items():
            for beta in (0.5, 1.5):
                target = Target.purified(beta, 4.0)
                found[tokens, kind, beta] = errors_of_fused(problem, problem, target, divergence, chunk_tokens=chunk)
    assert counters["stats"]["unique_graphs"] == graphs
    assert max(map(max, found.values())) < 1e-5, found
    assert not multiprocessing.active_children()


def _fused_in_shards(rank: int, world_size: int):
    """A shard with some padding, and one that holds only padding."""
    group, found = dist.group.WORLD, []
    for vocab in (300, 130):
        problem = make_problem(3, tokens=9, hidden=16, vocab=vocab, padded=320, sharpness=0.5).to(torch.float32)
        mine = problem.shard(rank, world_size)
        settings = {"diagnosed": diagnosed(mine, [2])}
        if vocab > 160 or rank == 0:
            found += errors_of_fused(problem, mine, TARGET, Divergence(), group, **settings)
        else:  # nothing to compare, but the other rank needs this rank's collectives
            hidden_loss(mine, TARGET, Divergence(), group, fused="always", **settings)[0].total.backward()
    return found


@pytest.mark.slow
def test_fused_agrees_with_the_dense_reference_in_shards():
    for found in run_ranks(_fused_in_shards, 2, timeout=500.0):
        assert max(found) < 1e-5, found


@pytest.mark.slow
def test_fused_keeps_an_exact_zero():
    problem = make_problem(4, vocab=60, padded=64).to(torch.float32)
    same = type(problem)(**{**vars(problem), "base": problem.student, "reference": problem.privileged})
    for divergence in KINDS.values():
        result, hidden, weight = hidden_loss(same, Target.purified(), divergence, fused="always", shared=True)
        result.total.backward()
        assert result.per_token.count_nonzero() == hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


@pytest.mark.slow
def test_fused_keeps_non_finite_values():
    problem = make_problem(5, vocab=60, padded=64).to(torch.float32)
    for field, divergence in itertools.product(("student", "base", "privileged"), KINDS.values()):
        hidden = getattr(problem, field).clone()
        hidden[4, 1] = float("nan")
        poisoned = type(problem)(**{**vars(problem), field: hidden})
        got, _, _ = hidden_loss(poisoned, Target.purified(), divergence, fused="always")
        assert got.per_token.isnan().tolist() == [token == 4 for token in range(7)]


def test_small_vocabularies_and_float64_are_not_compiled_by_default():
    assert not fusion.choose_kernels("auto", 1000, torch.float32).fused
    assert not fusion.choose_kernels("auto", 19000, torch.float64).fused
    assert fusion.choose_kernels("auto", 19000, torch.float32).fused
    assert fusion.choose_kernels("always", 10, torch.float32).fused
    assert not fusion.choose_kernels("never", 19000, torch.float32).fused
    with pytest.raises(UserError, match="fused='yes'"):
        fusion.choose_kernels("yes", 10, torch.float32)


def test_without_a_compiler_a_warning_is_logged_and_the_loss_is_computed_uncompiled(monkeypatch, caplog):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(fusion, "_fused", None)
    monkeypatch.setattr(fusion._Compiled, "broken", False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    problem = make_problem(6).to(torch.float32)
    with caplog.at_level(logging.WARNING):
        got, _, _ = hidden_loss(problem, Target.purified(), Divergence(), fused="always")
    want, _, _ = hidden_loss(problem, Target.purified(), Divergence(), fused="never")
    assert torch.equal(got.per_token, want.per_token)
    assert [record.message for record in caplog.records] == [
        "torch.compile failed, so the loss runs unfused and is slower: RuntimeError: no working C++ compiler found"
    ]
    assert not fusion.choose_kernels("always", 10, torch.float32).fused
