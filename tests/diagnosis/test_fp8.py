"""The error of a target in emulated FP8, compared with the distilled effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.diagnosis.fp8 import TargetError, error_sums
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize("error", [0.01, 0.2])
def test_an_error_is_compared_with_the_effect(error: float) -> None:
    base = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    target, measured = (base + torch.tensor([shift, -shift]) for shift in (0.1, 0.1 + error))
    sums = error_sums((base.log(), measured.log()), (base.log(), target.log())).tolist()
    found = TargetError.of("blockwise", sums)
    assert (found.recipe, found.tokens, found.base_error) == ("blockwise", 2, 0)
    assert (found.error, found.effect) == pytest.approx((error, 0.1), rel=1e-5)
    assert found.ratio == pytest.approx(error / 0.1, rel=1e-5)
    assert found.larger == float(error > 0.1)
    assert f"{found.ratio:.2f} of the effect 0.1000" in found.sentence()


def test_without_an_effect_every_error_is_too_large() -> None:
    assert TargetError.of("blockwise", [0.0, 1.0, 0.0, 2.0, 2.0]).ratio == math.inf
    assert TargetError.of("blockwise", [0.0] * 5).tokens == 0


def _errors(rank: int, world_size: int, folder: Path, adaptation: str) -> list[TargetError]:
    from nemo_popsd.config.sections import diagnosis_settings
    from nemo_popsd.diagnosis.forwards import generate_rollouts
    from nemo_popsd.diagnosis.fp8 import layer_linears, target_errors
    from tests.training.runs import row, settings, start

    config = settings(
        student={"adaptation": adaptation},
        parallel={"tensor": world_size},
        training={"frozen_tokens": 20},
        diagnosis={"chunk_tokens": 7},
    )
    run = start(folder, config)
    weights = [p.clone() for p in run.student.gpt.parameters()]
    chosen, rows = diagnosis_settings(config), [row(index) for index in range(5)]
    rollouts = generate_rollouts(run.student, run.engine(), run.sampling, rows, chosen, None)
    with run.student.base.model() as base:
        assert len(layer_linears(base)) == 2 * 4
    errors = target_errors(run.student, rollouts, chosen, ["blockwise", "tensorwise"])
    assert all(torch.equal(a, b) for a, b in zip(weights, run.student.gpt.parameters(), strict=True))
    return errors


@pytest.mark.slow
def test_errors_match_those_of_the_whole_model_in_every_layout(tmp_path: Path) -> None:
    """Blocks of shards are blocks of the matrices. Values midway between two e4m3 values may round differently."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    folder = save_tiny_model(tmp_path / "qwen3", "qwen3", **sizes)
    [whole] = run_ranks(_errors, 1, folder, "lora")
    split = run_ranks(_errors, 2, folder, "full")
    assert split[0] == split[1]
    assert [e.recipe for e in whole] == ["blockwise", "tensorwise"]
    for one, two in zip(whole, split[0], strict=True):
        assert one.tokens == two.tokens > 20
        assert one.effect == pytest.approx(two.effect, rel=1e-4)
        assert 0 < one.base_error < 0.2
    assert whole[0].error == pytest.approx(split[0][0].error, rel=0.05)
    assert whole[0].error < whole[0].effect
