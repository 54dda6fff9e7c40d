"""Emulated FP8: rounding by each recipe, and the context in which linear modules are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_popsd.diagnosis.fp8_rounding import ROUNDINGS, Delayed, emulated, per_block, per_tensor
from nemo_popsd.megatron.config import FP8_MULTIPLES

VALUES = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))


def test_every_recipe_is_emulated() -> None:
    assert ROUNDINGS.keys() == FP8_MULTIPLES.keys()


@pytest.mark.parametrize("recipe", ROUNDINGS)
def test_inputs_and_weights_have_four_significant_bits(recipe: str) -> None:
    """e4m3 has three mantissa bits: the relative error of normal values is at most a sixteenth."""
    large = VALUES.abs() > 0.05
    for rounding in ROUNDINGS[recipe]():
        for x in (VALUES, VALUES.bfloat16()):
            wide = x.float()
            off = (rounding(x) - wide).abs()
            assert float((off / wide.abs())[large].max()) <= 1 / 16 + 1e-6
            assert float(off.mean()) > 1e-3, "rounded"
        assert rounding(torch.zeros(3, 5)).eq(0).all()


def test_a_large_value_affects_only_its_block() -> None:
    x = VALUES * 1e-3
    x[0, 0] = 1e5
    off = {recipe: (make()[0](x) - x).abs() for recipe, make in ROUNDINGS.items()}
    assert float(off["tensorwise"][1:].max()) == float(x[1:].abs().max()), "below the smallest value: 0"
    assert float(off["blockwise"][1:].max()) < 1e-3 * VALUES.abs().max() / 8
    assert float(off["mxfp8"][0, 32:].max()) < 1e-3 * VALUES.abs().max() / 8 < float(off["blockwise"][0, 32:128].max())


def test_delayed_scaling_saturates_at_the_largest_previous_value() -> None:
    rounding = Delayed()
    rounding(torch.tensor([1.0]))
    assert rounding(torch.tensor([4.0])).tolist() == [1.0]
    assert rounding(torch.tensor([4.0])).tolist() == [4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_are_rounded_only_within_the_context(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 8)).to(dtype)
    x = torch.randn(4, 128, dtype=dtype)
    with torch.no_grad():
        exact = layers(x)
        with emulated([layers[0], layers[2]], "tensorwise"):
            measured = layers(x)
        by_hand = x
        for linear in (layers[0], layers[2]):
            inputs, weight = per_tensor(by_hand).to(dtype), per_tensor(linear.weight).to(dtype)
            by_hand = nn.functional.linear(inputs, weight, linear.bias)
            by_hand = nn.functional.silu(by_hand) if linear is layers[0] else by_hand
        assert torch.equal(measured, by_hand)
        assert torch.equal(layers(x), exact)
    assert not torch.equal(by_hand, exact)


def test_powers_of_two_are_exact_in_bf16() -> None:
    """Scales of blocks are powers of two, so that bf16 represents the FP8 values exactly."""
    for rounded in (per_block(VALUES, 1), per_block(VALUES, 128)):
        assert torch.equal(rounded.bfloat16().float(), rounded)
