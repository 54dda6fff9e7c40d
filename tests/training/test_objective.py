"""A complete step against the paper's equations on dense models: loss, gradient of every weight, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

LENGTHS = (9, 1, 4, 6)
"""Response tokens of rows 0 to 3."""
TOLERANCE = 1e-5
"""Of the largest gradient of a tensor; both sides round norms and softmax to fp32, which costs up to 2e-6."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"base": save_tiny_model(folder / "base"), "live": save_tiny_model(folder / "live", seed=1)}


@pytest.fixture(scope="module")
def dense(models: dict[str, Path]) -> dict[str, Any]:
    from tests.training.dense import dense_step
    from tests.training.runs import trajectory

    torch.set_num_threads(1)
    rows = [trajectory(number, length) for number, length in enumerate(LENGTHS)]
    return {mean: dense_step(models["live"], models["base"], rows, loss_mean=mean) for mean in ("sequence", "token")}


def whole_step(rank: int, world_size: int, models: dict[str, Path], scratch: Path, tensor: int) -> dict[str, Any]:
    """Metrics and gradients under both means.

    The shares are unequal: rank 1 of two has a single response of one token.
    """
    from tests.training.runs import ScriptedEngine, named_gradients, response, row, settings, start

    replicas = world_size // tensor
    mine = {1: [[0, 1, 2, 3]], 2: [[0, 2, 3], [1]]}[replicas][rank // tensor]
    config = settings(
        parallel={"tensor": tensor},
        training={"microbatch_tokens": 30, "frozen_tokens": 64},
        optimizer={"distributed": "false"},  # `named_gradients` reads complete gradients
    )
    run = start(models["base"], config, initial=models["live"])
    results: dict[str, Any] = {}
    for mean in ("sequence", "token"):
        config.distillation.loss_mean = mean
        step = run.on_policy_step(ScriptedEngine([response(number, LENGTHS[number]) for number in mine], lambda: 1))
        gradients: dict[str, torch.Tensor] = {}
        update = lambda gradients=gradients: gradients.update(named_gradients(run, scratch / "gradients"))  # noqa: E731
        metrics = step(2, [row(number) for number in mine], run.optimizer, update)
        results[mean] = (metrics, gradients)
    return results


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 2), (2, 1)], ids=["one", "tp2", "dp2"])
def test_a_step_is_the_papers_equations(
    models: dict[str, Path], dense: dict[str, Any], tmp_path: Path, world_size: int, tensor: int
) -> None:
    for by_mean in run_ranks(whole_step, world_size, models, tmp_path, tensor):
        for mean, (metrics, gradients) in by_mean.items():
            expected = dense[mean]
            assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
            for name, value in expected.metrics.items():
                assert metrics.statistics[name] == pytest.approx(value, rel=1e-5), name
            assert metrics.response_tokens == sum(LENGTHS) / len(LENGTHS)
            assert gradients.keys() == expected.gradients.keys()
            worst = {
                name: float((gradients[name] - gradient).abs().max() / gradient.abs().max())
                for name, gradient in expected.gradients.items()
            }
            assert max(worst.values()) < TOLERANCE, worst
            norm = torch.cat([gradient.flatten() for gradient in expected.gradients.values()]).norm()
            assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-5)
