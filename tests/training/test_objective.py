"""A complete step against the paper's equations on dense models: loss, gradient of every weight, metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.distillation.config import TokensConfig
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

LENGTHS = (9, 1, 4, 6)
"""Response tokens of rows 0 to 3."""
WEIGHTED = TokensConfig(
    markers=0.3, horizon=7, half_life=5.0, truncated=0.7, right=1.5, wrong=0.4, min_student_entropy=4.64
)
CASES: dict[str, tuple[str, TokensConfig | None]] = {
    "sequence": ("sequence", None),
    "token": ("token", None),
    "sequence, weighted": ("sequence", WEIGHTED),
    "token, weighted": ("token", WEIGHTED),
}
"""Cases by name: mean and token weights."""
TOLERANCE = 1e-5
"""Relative to the largest gradient of a tensor. Both sides round norms and softmax to fp32, an error of up to 2e-6."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"base": save_tiny_model(folder / "base"), "live": save_tiny_model(folder / "live", seed=1)}


@pytest.fixture(scope="module")
def dense(models: dict[str, Path]) -> dict[str, Any]:
    from tests.training.dense import dense_step
    from tests.training.runs import STOPS, trajectory

    torch.set_num_threads(1)
    rows = [trajectory(number, length) for number, length in enumerate(LENGTHS)]
    rows = [replace(t, rollout=replace(t.rollout, truncated=t.rollout.response[-1] not in STOPS)) for t in rows]
    return {
        name: dense_step(models["live"], models["base"], rows, loss_mean=mean, tokens=tokens)
        for name, (mean, tokens) in CASES.items()
    }


def whole_step(rank: int, world_size: int, models: dict[str, Path], scratch: Path, tensor: int) -> dict[str, Any]:
    """Metrics and gradients of each case.

    Shares are unequal: with two ranks, rank 1 has a single response of one token.
    """
    from tests.training.runs import EVEN_TOKENS, ScriptedEngine, named_gradients, response, row, settings, start

    replicas = world_size // tensor
    mine = {1: [[0, 1, 2, 3]], 2: [[0, 2, 3], [1]]}[replicas][rank // tensor]
    config = settings(
        parallel={"tensor": tensor},
        training={"microbatch_tokens": 30, "frozen_tokens": 64},
        optimizer={"distributed": "false"},  # `named_gradients` reads complete gradients
    )
    run = start(models["base"], config, initial=models["live"])
    results: dict[str, Any] = {}
    for name, (mean, tokens) in CASES.items():
        config.distillation.loss_mean, config.distillation.tokens = mean, tokens or TokensConfig()
        is_right = lambda record, response: response[0] % 2 == 0  # noqa: E731
        run.reader = replace(EVEN_TOKENS, is_right=is_right if tokens else None)
        step = run.on_policy_step(ScriptedEngine([response(number, LENGTHS[number]) for number in mine], lambda: 1))
        gradients: dict[str, torch.Tensor] = {}
        update = lambda gradients=gradients: gradients.update(named_gradients(run, scratch / "gradients"))  # noqa: E731
        metrics = step(2, [row(number) for number in mine], run.optimizer, update)
        results[name] = (metrics, gradients)
    return results


def closed_steps(rank: int, world_size: int, model: Path) -> list[tuple[Any, float, list[str]]]:
    """Metrics, gradient and warnings with all gates closed, and with weight 0 for every response."""
    from nemo_popsd.training import step as module
    from tests.training.runs import EVEN_TOKENS, ScriptedEngine, response, row, settings, start

    config = settings(training={"prompts_per_step": 2 * world_size})
    run = start(model, config)
    run.reader = replace(EVEN_TOKENS, is_right=lambda record, response: False)
    mine, seen = [2 * rank, 2 * rank + 1], []
    for tokens in (TokensConfig(min_target_entropy=90.0), TokensConfig(wrong=0.0)):
        config.distillation.tokens, warnings = tokens, []
        module.logger.warning = lambda text, *values, warnings=warnings: warnings.append(text % values)  # type: ignore
        step = run.on_policy_step(ScriptedEngine([response(number, LENGTHS[number]) for number in mine], lambda: 1))
        metrics = step(2, [row(number) for number in mine], run.optimizer, lambda: None)
        largest = max(float(p.main_grad.abs().max()) for p in run.student.gpt.parameters())
        seen.append((metrics, largest, warnings))
    return seen


def test_a_batch_in_which_no_token_counts_has_loss_zero_on_every_rank(models: dict[str, Path]) -> None:
    for seen in run_ranks(closed_steps, 2, models["base"]):
        for metrics, gradient, warnings in seen:
            assert (metrics.loss, metrics.grad_norm, metrics.weighted_share, gradient) == (0, 0, 0, 0)
            assert metrics.accuracy == 0
            assert warnings == ["step 2: no token has a weight (distillation.tokens), so the loss is 0"]


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 2), (2, 1)], ids=["one", "tp2", "dp2"])
def test_a_step_matches_the_papers_equations(
    models: dict[str, Path], dense: dict[str, Any], tmp_path: Path, world_size: int, tensor: int
) -> None:
    from tests.training.runs import response

    for by_case in run_ranks(whole_step, world_size, models, tmp_path, tensor):
        for name_of_case, (metrics, gradients) in by_case.items():
            expected = dense[name_of_case]
            assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
            for name, value in expected.metrics.items():
                assert metrics.statistics[name] == pytest.approx(value, rel=1e-5), name
            weighted = name_of_case.endswith("weighted")
            assert metrics.weighted_share == pytest.approx(expected.weighted_share)
            assert (0.2 < metrics.weighted_share < 0.8) is weighted
            first = [response(number, length)[0] % 2 == 0 for number, length in enumerate(LENGTHS)]
            assert metrics.accuracy == (sum(first) / len(first) if weighted else None)
            assert metrics.response_tokens == sum(LENGTHS) / len(LENGTHS)
            assert gradients.keys() == expected.gradients.keys()
            worst = {
                name: float((gradients[name] - gradient).abs().max() / gradient.abs().max())
                for name, gradient in expected.gradients.items()
            }
            assert max(worst.values()) < TOLERANCE, worst
            norm = torch.cat([gradient.flatten() for gradient in expected.gradients.values()]).norm()
            assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-5)
