from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model


def poisoned_step(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """Steps on two data-parallel ranks, one of which fails; returns error and weights of each rank."""
    from nemo_popsd.training import step as module
    from nemo_popsd.training.guard import NonFiniteError, refuse_non_finite
    from tests.digests import base_digest
    from tests.training.runs import ScriptedEngine, response, row, settings, start

    run = start(model, settings())
    numbers, begins_with = [2 * rank, 2 * rank + 1], [0]
    step = run.on_policy_step(
        ScriptedEngine([response(number, 4 + number) for number in numbers], lambda: begins_with[0])
    )
    rows = [row(number) for number in numbers]
    seen: dict[str, Any] = {"before": base_digest(run.student.gpt)}
    healthy = module.FrozenBranches.target_states

    def poisoned(self: Any, trajectories: Any) -> Any:
        states = healthy(self, trajectories)
        for trajectory, state in zip(trajectories, states, strict=True):
            if trajectory.row_id == "row3":  # the rank of this row depends on the lengths
                state.vectors.anchor[3] = torch.nan
                seen["holds it"] = rank
        return states

    def attempt(number: int) -> str:
        begins_with[0] = number - 1
        try:
            step(number, rows, run.optimizer, run.update)
        except NonFiniteError as error:
            return str(error)
        return "no error"

    module.FrozenBranches.target_states = poisoned  # type: ignore[method-assign]
    seen["row"] = attempt(7)
    module.FrozenBranches.target_states = healthy  # type: ignore[method-assign]
    true_norm = run.optimizer.prepare
    run.optimizer.prepare = lambda: (true_norm(), float("inf"))[1]  # type: ignore[method-assign]
    seen["norm"] = attempt(8)
    run.optimizer.prepare = true_norm  # type: ignore[method-assign]
    seen["after"], seen["steps"] = base_digest(run.student.gpt), run.steps
    try:  # Inf on rank 0 only, without reports: rank 1 must raise too
        refuse_non_finite(9, [], [], float("inf") if rank == 0 else 1.0)
    except NonFiniteError as error:
        seen["one rank's norm"] = str(error)
    refuse_non_finite(10, [], [], 1.0)
    seen["healthy"] = attempt(11)
    seen["trained"] = base_digest(run.student.gpt)
    true_step = run.optimizer.megatron.step

    def overflow() -> None:  # on one rank, as with a learning rate of 1e38 and finite gradients
        true_step()
        if rank == 1:
            run.optimizer.trained[-1].data.mul_(1e30).mul_(1e30)

    run.optimizer.megatron.step = overflow  # type: ignore[method-assign]
    seen["update"] = attempt(12)
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, layers: str) -> list[dict[str, Any]]:
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "hf")
    return run_ranks(poisoned_step, 2, model, layers=layers)


def test_nan_in_one_ranks_row_stops_every_rank_and_names_it(ranks: list[dict[str, Any]]) -> None:
    [holder] = [seen["holds it"] for seen in ranks if "holds it" in seen]
    for seen in ranks:
        assert "step 7" in seen["row"]
        assert f"rank {holder}: rows row3;" in seen["row"]
        assert f"rank {1 - holder}" not in seen["row"]


def test_an_infinite_gradient_norm_alone_stops_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "step 8" in seen["norm"]
        assert "all losses are finite; gradient norm inf" in seen["norm"]
        assert "step 9" in seen["one rank's norm"]


def test_weights_that_are_not_finite_after_an_update_stop_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "step 12: got weights that are NaN or Inf after the update" in seen["update"]
        assert "set optimizer.lr lower" in seen["update"]


def test_no_weight_is_changed_and_a_healthy_step_continues(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["after"] == seen["before"]
        assert seen["steps"] == 0
        assert seen["healthy"] == "no error"
        assert seen["trained"] != seen["before"]
