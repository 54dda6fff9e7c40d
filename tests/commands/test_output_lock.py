"""Complete runs and the lock of their output."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.files.output_lock import OutputLock
from tests.harness import run_ranks
from tests.model import runs

pytestmark = pytest.mark.slow


def taken_over(rank: int, world_size: int, output: Path, words: tuple[str, ...]) -> Any:
    """A run whose output another run takes over in the second step."""
    from nemo_popsd.training.step import OnPolicyStep

    accumulate = OnPolicyStep._accumulate
    calls = [0]

    def take_over(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and rank == 0:
            other = {"token": "other", "host": "node7", "pid": 42, "since": "now"}
            (output / "lock" / "holder-000002").write_text(json.dumps(other))
        return accumulate(self, *args)

    OnPolicyStep._accumulate = take_over  # type: ignore[method-assign]
    return runs._train(rank, world_size, output, words, None)


def test_a_run_whose_output_was_taken_over_ends_on_all_ranks_and_writes_nothing(tmp_path: Path) -> None:
    words = ("parallel.tensor=2", "training.checkpoint_every=1", "data.validation.path=", "training.self_check=false")
    printed = run_ranks(taken_over, 2, tmp_path, words, timeout=240)
    for status, text in printed:
        assert status == 2, text
        lines = [line for line in text.splitlines() if "popsd: error" in line]
        assert len(lines) == 1
        assert "got another run, which took over" in lines[0]
        assert "host node7, process 42" in lines[0]
        assert "Traceback" not in text
    assert [step for step, _ in runs.metrics(tmp_path, "train/loss")] == [1]
    assert not (tmp_path / "checkpoints" / "step-000002").exists()
    assert (tmp_path / "lock" / "holder-000002").exists(), "the lock of the other run was removed"


def test_a_second_run_ends_at_once_and_a_killed_one_is_resumed_at_once(tmp_path: Path) -> None:
    words = ("data.validation.path=", "training.self_check=false", "training.steps=2", "training.checkpoint_every=1")
    runs.train_and_die(tmp_path, *words, plan={"step": 2, "signal": signal.SIGKILL})
    left = sorted(path.name for path in (tmp_path / "lock").iterdir())
    assert [name[:6] for name in left] == ["alive-", "holder"]
    other = OutputLock(tmp_path)  # succeeds at once: the holder was killed
    ((status, text),) = runs.train(tmp_path, *words)
    assert status == 2, text
    assert "another run in it" in text
    other.release()
    ((status, text),) = runs.train(tmp_path, *words)
    assert status == 0, text
    assert "resuming after step 1" in text
    assert not (tmp_path / "lock").exists()
