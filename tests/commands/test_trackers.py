"""A complete run with a real tracker and one that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.model import runs

pytestmark = pytest.mark.slow

WORDS = (
    "training.steps=2",
    "training.checkpoint_every=0",
    "training.self_check=false",
    "diagnosis.in_training=false",
    "observability.mlflow.enabled=true",
)


def with_trackers(rank: int, world_size: int, output: Path) -> Any:
    """A run with MLflow's files, whose TensorBoard cannot be written; what MLflow's own client then reads."""
    import mlflow

    from nemo_popsd.observability import loggers

    class Broken:
        def __init__(self, **options: Any) -> None:
            raise OSError(28, "No space left on device")

    loggers.TensorBoardLogger = Broken  # type: ignore[misc,assignment]
    status, text = runs._train(rank, world_size, output, WORDS, None)
    client = mlflow.MlflowClient((output / "mlflow").as_uri())
    name = json.loads((output / "trackers.json").read_text())["mlflow"]
    history = client.get_metric_history(name, "train/loss")
    accuracy = client.get_metric_history(name, "validation/accuracy")
    return status, text, client.get_run(name).info.status, [p.step for p in history], [p.step for p in accuracy]


def test_failing_trackers_do_not_fail_a_run(tmp_path: Path) -> None:
    ((status, text, state, trained, validated),) = run_ranks(with_trackers, 1, tmp_path, timeout=300)
    assert status == 0, text
    assert text.count("TensorBoard is turned off: OSError: [Errno 28] No space left on device") == 1, text
    assert (state, trained, validated) == ("FINISHED", [1, 2], [0, 2])
    assert [step for step, _ in runs.metrics(tmp_path, "train/loss")] == [1, 2]
    assert (tmp_path / "DONE").exists()
