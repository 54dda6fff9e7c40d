from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "hf")


def check(rank: int, world_size: int, model: Path, tensor: int, adaptation: str) -> dict[str, Any]:
    """The check on an untrained student, and after each of three faults."""
    from nemo_popsd.distillation import Divergence, Target
    from nemo_popsd.training import self_check
    from nemo_popsd.training.objective import Objective
    from tests.digests import base_digest
    from tests.training.runs import settings, start, trajectory

    run = start(model, settings(parallel={"tensor": tensor}, student={"adaptation": adaptation}))
    settled = {"chunk_tokens": 8, "fused": "never"}
    objective = Objective(run.student, Target.purified(), Divergence(), **settled)
    sequences = [trajectory(number, 3 + 4 * number).student for number in range(2)]
    logged: list[tuple[float, float]] = []
    self_check.logger.info = lambda _, *numbers: logged.append(numbers)  # type: ignore[method-assign, assignment]
    before = base_digest(run.student.gpt)

    def outcome() -> str:
        try:
            self_check.check_student_equals_base(run.student, run.optimizer, objective, sequences, 4096)
        except RuntimeError as error:
            return str(error)
        return "passed"

    modes: list[bool] = []
    with run.student.base.model() as [base]:
        for model_ in {run.student.gpt, base}:
            model_.decoder.register_forward_pre_hook(lambda decoder, _: modes.append(decoder.training))
    seen: dict[str, Any] = {"fresh": outcome(), "numbers": list(logged), "modes": modes.copy()}
    gradients = [p.main_grad.abs().max().item() for p in run.student.gpt.parameters() if p.requires_grad]
    seen["gradients left"] = max(gradients)
    seen["weights kept"] = base_digest(run.student.gpt) == before
    faulty = "linear_out.weight" if adaptation == "lora" else "linear_fc1.weight"
    parameter = next(p for name, p in run.student.gpt.named_parameters() if name.endswith(faulty))
    with torch.no_grad():
        parameter[0] += 0.05
        seen["live weight"] = outcome()
        parameter[0] -= 0.05
    if adaptation == "full":
        with run.student.base.model() as [base], torch.no_grad():
            base.decoder.layers[1].self_attention.linear_proj.weight[3] *= 1.01
        seen["base weight"] = outcome()
    return seen


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_zero_at_the_start_and_an_explanation_otherwise(model: Path, tensor: int, adaptation: str, layers: str) -> None:
    for seen in run_ranks(check, tensor, model, tensor, adaptation, layers=layers):
        assert seen["fresh"] == "passed"
        assert seen["numbers"] == [(0.0, 0.0)]
        assert len(seen["modes"]) >= 2
        assert all(seen["modes"]), "both in training mode: a GPU uses other kernels in evaluation"
        assert seen["gradients left"] == 0
        assert seen["weights kept"]
        for fault in {"full": ["live weight", "base weight"], "lora": ["live weight"]}[adaptation]:
            assert "self-check failed" in seen[fault], fault
            assert "do not compute the same thing" in seen[fault]
            assert "training.self_check=false" in seen[fault]
