"""A frozen copy on the host: the same training, the same bits, and only the output matrix left on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import StudentConfig
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model

STEPS = 3
KINDS = ("qwen3", "qwen3_tied")


def train(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Three steps of each adaptation with the copy in each place."""
    return {
        f"{kind} {place}": _train(folder / kind, world_size, place) for kind in KINDS for place in ("device", "host")
    }


def _train(directory: Path, tensor: int, place: str) -> dict[str, Any]:
    from tests.digests import base_digest
    from tests.training.runs import row, settings, start

    run = start(directory, settings(parallel={"tensor": tensor}, student={"frozen_copy": place}))
    step, base = run.on_policy_step(), run.student.base
    with base.model() as [model]:
        before = base_digest(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = run.student.base_weight
    losses = [step(n + 1, [row(4 * n + i) for i in range(4)], run.optimizer, run.update).loss for n in range(STEPS)]
    with base.model() as [model], base.model():  # nested: copied once
        after = base_digest(model)
        within = base.device_bytes
    return {
        "losses": losses,
        "base is the same": before == after,
        "base_digest": after,
        "student": base_digest(run.student.gpt),
        "weights": weights,
        "matrix": kept.numel() * kept.element_size(),
        "matrix stayed": kept.data_ptr() == run.student.base_weight.data_ptr() and bool(kept.isfinite().all()),
        "bytes": {"outside": base.device_bytes, "within": within, "host": base.host_bytes},
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_tiny_model(folder / kind, kind)
    return run_ranks(train, request.param, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_where_the_copy_is_kept(trained: list[dict[str, Any]], kind: str) -> None:
    for rank in trained:
        device, host = rank[f"{kind} device"], rank[f"{kind} host"]
        assert host["losses"] == device["losses"]
        assert len(set(host["losses"])) == STEPS
        assert host["student"] == device["student"] != host["base_digest"]
        assert device["base is the same"]
        assert host["base is the same"]
        assert host["base_digest"] == device["base_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_between_the_frozen_passes_only_the_output_matrix_is_on_the_device(trained: Any, kind: str) -> None:
    for rank in trained:
        device, host = rank[f"{kind} device"], rank[f"{kind} host"]
        weights, matrix = host["weights"], host["matrix"]
        assert 0 < matrix < weights
        assert host["matrix stayed"]
        assert host["bytes"] == {"outside": matrix, "within": weights, "host": weights - matrix}
        assert device["bytes"] == {"outside": weights, "within": weights, "host": 0}


def fail_within(rank: int, world_size: int, directory: Path) -> tuple[int, int]:
    student = build_student(directory, frozen_copy="host")
    base = student.base
    outside = base.device_bytes
    with pytest.raises(RuntimeError, match="planted"), base.model():
        raise RuntimeError("planted")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError):
        base._copy[0](input_ids=ids, position_ids=ids, attention_mask=None)
    return outside, base.device_bytes


def test_after_an_error_the_parameters_are_off_the_device_and_using_them_fails(tmp_path: Path) -> None:
    ((before, after),) = run_ranks(fail_within, 1, save_tiny_model(tmp_path / "model"))
    assert before == after


def test_lora_refuses_a_copy_on_the_host(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no copy"):
        StudentConfig(frozen_copy="host")
    with pytest.raises(UserError, match="one of device, host"):
        StudentConfig(frozen_copy="disk", adaptation="full")
    conf = Path(__file__).parents[2] / "conf" / "tiny.yaml"
    assert load_config(conf, ["student.frozen_copy=host"]).student.frozen_copy == "host"
