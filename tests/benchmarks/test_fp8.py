"""FP8 as it is emulated, and the comparison of its error with the effect."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from benchmarks import fp8

VALUES = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", fp8.RECIPES)
def test_inputs_and_weights_have_four_significant_bits(name: str) -> None:
    """e4m3 has three bits after the first: normal values are off by at most a sixteenth of themselves."""
    large = VALUES.abs() > 0.05
    for rounding in fp8.RECIPES[name]():
        for x in (VALUES, VALUES.bfloat16()):
            wide = x.float()
            off = (rounding(x) - wide).abs()
            assert float((off / wide.abs())[large].max()) <= 1 / 16 + 1e-6
            assert float(off.mean()) > 1e-3, "rounded"
        assert rounding(torch.zeros(3, 5)).eq(0).all()


def test_a_large_value_costs_its_block_alone() -> None:
    x = VALUES * 1e-3
    x[0, 0] = 1e5
    off = {name: (rounding(x) - x).abs() for name, (rounding, _) in ((n, r()) for n, r in fp8.RECIPES.items())}
    assert float(off["FP8, current"][1:].max()) == float(x[1:].abs().max()), "smaller than the least value: 0"
    assert float(off["FP8, blockwise"][1:].max()) < 1e-3 * VALUES.abs().max() / 8


def test_delayed_scaling_saturates_at_what_it_has_seen() -> None:
    rounding = fp8.Delayed()
    rounding(torch.tensor([1.0]))
    assert rounding(torch.tensor([4.0])).tolist() == [1.0]
    assert rounding(torch.tensor([4.0])).tolist() == [4.0]


def test_linears_are_rounded_within_the_context_alone() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 8))
    x = torch.randn(4, 128)
    exact = layers(x)
    with fp8.quantised(layers, fp8.RECIPES["FP8, current"]):
        first = nn.functional.linear(fp8.per_tensor(x), fp8.per_tensor(layers[0].weight), layers[0].bias)
        hidden = nn.functional.silu(first)
        by_hand = nn.functional.linear(fp8.per_tensor(hidden), fp8.per_tensor(layers[2].weight), layers[2].bias)
        torch.testing.assert_close(layers(x), by_hand)
    assert torch.equal(layers(x), exact)
    assert not torch.equal(by_hand, exact)


@pytest.mark.parametrize(("error", "warned"), [(0.01, False), (0.2, True)])
def test_an_error_above_the_effect_is_warned_of(error: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    base = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    target, measured = (base + torch.tensor([shift, -shift]) for shift in (0.1, 0.1 + error))
    with caplog.at_level(logging.WARNING, logger="benchmarks.fp8"):
        cells, ratio = fp8.compared("FP8", (base.log(), measured.log()), (base.log(), target.log()))
    assert ratio == pytest.approx(error / 0.1, rel=1e-5)
    assert cells[1:4] == ["0.0000", f"{error:.4f}", "0.1000"]
    assert cells[-1] == ("100%" if warned else "0%")
    assert [record.levelname for record in caplog.records if record.name == "benchmarks.fp8"] == ["WARNING"] * warned
