"""Runs and checkpoints of the other stack of library versions (tests.stacks), resumed and converted with this one.

Each direction is tested on the stack that reads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.runs import LORA, SETTINGS, TINY, metrics, train
from tests.stacks import installed, other_python

PYTHON = other_python()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="the other stack is not installed (make venv, make venv STACK=current)"),
]
ADAPTATIONS = {"full": (), "lora": (LORA,), "sharded optimizer": ("optimizer.distributed=true",)}
TWO_STEPS = ("training.steps=2", "optimizer.decay=constant")
FOUR_STEPS = ("training.steps=4", "optimizer.decay=constant")


def _other(*words: str) -> None:
    """A command of the other stack, one process."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TE_ENV")}
    command = [str(PYTHON), "-W", "ignore", "-m", "nemo_popsd", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on the other stack."""
    folder = tmp_path_factory.mktemp("written")
    for adaptation, words in ADAPTATIONS.items():
        _other("train", TINY, f"output={folder / adaptation}", *SETTINGS, *TWO_STEPS, *words)
    return folder


def test_the_stacks_differ() -> None:
    versions = subprocess.run(
        [str(PYTHON), "-c", "from tests.stacks import installed; print(installed())"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert {versions.stdout.strip(), installed()} == {"26.02.01", "26.08"}


@pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
def test_a_run_of_the_other_stack_is_resumed(written: Path, tmp_path: Path, adaptation: str) -> None:
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    for steps in (TWO_STEPS, FOUR_STEPS):
        [(status, printed)] = train(alone, *steps, *ADAPTATIONS[adaptation])
        assert status == 0, printed
    shutil.copytree(written / adaptation, resumed)
    [(status, printed)] = train(resumed, *FOUR_STEPS, *ADAPTATIONS[adaptation])
    assert status == 0, printed
    assert "resuming after step 2" in printed
    losses = [dict(metrics(run, "train/loss")) for run in (alone, resumed)]
    assert list(losses[0]) == list(losses[1]) == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert losses[1][step] == pytest.approx(losses[0][step], rel=2e-3), step


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_checkpoint_of_the_other_stack_is_converted_to_the_same_bits(
    written: Path, tmp_path: Path, adaptation: str
) -> None:
    from nemo_popsd.cli.main import main

    checkpoint = str(written / adaptation / "checkpoints" / "final")
    _other("export", checkpoint, str(tmp_path / "other"))
    assert main(["export", checkpoint, str(tmp_path / "this")]) == 0
    other, this = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "this"))
    assert other.keys() == this.keys()
    assert [name for name in other if not torch.equal(other[name], this[name])] == []
