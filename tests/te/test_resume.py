"""A run on Transformer Engine's layers that is killed and resumed, on the same layers and on local ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.harness import LOCAL, TRANSFORMER_ENGINE
from tests.layers import on_transformer_engine
from tests.model.runs import LORA, differences, metrics, rollouts, train, train_and_die

pytestmark = [on_transformer_engine, pytest.mark.slow]

ADAPTATIONS = {"full": (), "lora": (LORA,)}


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_killed_run_ends_with_the_same_bits_and_can_continue_on_local_layers(tmp_path: Path, adaptation: str) -> None:
    """Killed in step 4, with a checkpoint after step 2: weights, optimizer and random state come from it."""
    words = ADAPTATIONS[adaptation]
    complete, killed, moved = (tmp_path / name for name in ("complete", "killed", "moved"))
    status, printed = train(complete, *words, layers=TRANSFORMER_ENGINE)[0]
    assert status == 0, printed
    assert "layers: transformer_engine" in printed
    train_and_die(killed, *words, plan={"step": 4}, layers=TRANSFORMER_ENGINE)
    assert [step for step, _ in metrics(killed, "train/loss")] == [1, 2, 3]
    shutil.copytree(killed, moved)
    for output, layers in ((killed, TRANSFORMER_ENGINE), (moved, LOCAL)):
        status, printed = train(output, *words, layers=layers)[0]
        assert status == 0, printed
        assert "resuming after step 2" in printed
        assert f"layers: {layers}" in printed
    assert differences(complete / "checkpoints" / "final", killed / "checkpoints" / "final") == []
    assert rollouts(complete) == rollouts(killed)
    assert metrics(complete, "train/loss") == metrics(killed, "train/loss")
    there, here = metrics(complete, "train/loss"), metrics(moved, "train/loss")
    assert [step for step, _ in here] == [1, 2, 3, 4]
    # fp32, in another order of sums, as between layouts.
    assert [loss for _, loss in here] == pytest.approx([loss for _, loss in there], rel=3e-5)
