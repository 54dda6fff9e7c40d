"""Both forms of the loss against the dense float64 reference: value, dh, dW; with one shard and with several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distillation.calls import DIVERGENCES, GATES, all_cases, compare, compare_gated, worst
from tests.harness import run_ranks

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
CLIPPED = {torch.float64: 1e-10, torch.float32: 5e-5}
"""A clip leaves positive and negative entries that nearly cancel: rounding is larger relative to what is left."""


def check(errors, dtype) -> None:
    limits = [(e, (CLIPPED if "clip" in e.case else LIMITS)[dtype]) for e in errors]
    bad = [e for e, limit in limits if not (max(e.loss, e.total, e.dh, e.dw) <= limit and e.padding == 0)]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_one_shard_agrees_with_the_dense_reference(dtype):
    errors = [e for case in all_cases() for e in compare(case, dtype, seed=11)]
    check(errors, dtype)
    print(f"worst relative error {dtype}: {worst(errors):.2e}")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_gate_is_the_weight_zero_of_the_tokens_that_it_closes(gate, dtype):
    check([compare_gated(gate, divergence, dtype, seed=17) for divergence in DIVERGENCES], dtype)


def _two_groups(rank: int, world_size: int):
    """Two tensor-parallel groups of two, each with its own problem; the default group would mix them."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = rank // 2
    cases = {torch.float64: all_cases(), torch.float32: all_cases()[::2]}
    return {
        dtype: [e for case in cases[dtype] for e in compare(case, dtype, 21 + mine, rank % 2, 2, groups[mine])]
        for dtype in LIMITS
    }


@pytest.mark.slow
def test_two_shards_agree_with_the_dense_reference_on_the_given_group():
    for by_dtype in run_ranks(_two_groups, 4):
        for dtype, errors in by_dtype.items():
            check(errors, dtype)
            print(f"worst relative error {dtype}: {worst(errors):.2e}")


def _four_shards(rank: int, world_size: int):
    cases, world = all_cases()[::7], dist.group.WORLD
    errors = [e for case in cases for e in compare(case, torch.float64, 31, rank, world_size, world)]
    errors += [compare_gated("all", name, torch.float64, 17, rank, world_size, world) for name in DIVERGENCES]
    return errors


@pytest.mark.slow
def test_four_shards_agree_with_the_dense_reference():
    for errors in run_ranks(_four_shards, 4):
        check(errors, torch.float64)
