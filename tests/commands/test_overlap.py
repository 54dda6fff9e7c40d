"""Complete runs in which a real vLLM generates the responses of the next step while a step trains."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.errors import SAVED_AND_STOPPED
from nemo_popsd.rollout.storage import RolloutStore
from tests.harness import run_ranks
from tests.model import runs
from tests.rollout.vllm_servers import SMALL, gone, needs_vllm

pytestmark = [pytest.mark.slow(seconds=30), needs_vllm]

WORDS = [*SMALL, "rollout.overlap=true", "rollout.max_response_tokens=100", "optimizer.lr=1e-3"]
KILLED_AFTER = 0.02


def train(
    rank: int, world_size: int, output: Path, words: list[str], plan: dict[str, Any] | None, lost_at: int | None
) -> Any:
    """`popsd train` of four steps, with a validation after the second.

    Args:
        rank: given by the harness.
        world_size: given by the harness.
        output: of the run.
        words: further overrides.
        plan: see `runs.train`.
        lost_at: the first server is killed while it generates with the weights of this version.

    Returns:
        Exit status, what was printed, the servers' pids.
    """
    from nemo_popsd.rollout.vllm import supervisor

    ask, pids = supervisor.VllmServer.ask, []

    def watched(self: Any, request: dict[str, Any], *args: Any, **named: Any) -> Any:
        if self.pid not in pids:
            pids.append(self.pid)
            (output / "pid").write_text(str(self.pid))
        if request["request"] == "generate" and self.version == lost_at and len(pids) == 1:
            threading.Timer(KILLED_AFTER, os.kill, (self.pid, signal.SIGKILL)).start()
        return ask(self, request, *args, **named)

    output.mkdir(exist_ok=True)
    supervisor.VllmServer.ask = watched  # type: ignore[method-assign]
    status, printed = runs._train(rank, world_size, output, (*WORDS, *words), plan)
    return status, printed, pids


def ages(output: Path) -> list[float]:
    """Maximum age of the tokens of each step; equal to the mean if the same weights generated all."""
    greatest = [age for _, age in runs.metrics(output, "train/rollout_age_max")]
    assert [age for _, age in runs.metrics(output, "train/rollout_age")] == pytest.approx(greatest)
    return greatest


def versions(output: Path) -> list[set[int]]:
    """Version of the weights that generated the rollouts of each step."""
    store = RolloutStore(output)
    return [{row.rollout.weights_version for row in store.read(step)} for step in store.steps()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("overlap") / "run"
    ((status, printed, pids),) = run_ranks(train, 1, output, [], None, None, timeout=300)
    assert status == 0, printed
    assert len(pids) == 1, "more than one server was started"
    assert gone(pids[0])
    return output


def test_steps_train_on_responses_of_the_previous_weights(undisturbed: Path) -> None:
    assert versions(undisturbed) == [{0}, {0}, {1}, {2}]
    assert ages(undisturbed) == [0, 1, 1, 1]
    assert [step for step, _ in runs.metrics(undisturbed, "validation/accuracy")] == [0, 2, 4]


def test_a_killed_run_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Killed in step 4, resumed after step 2: step 3 finds its rollouts, one step old, and continues."""
    output = tmp_path / "run"
    plan = {"rank": 0, "where": "trained", "step": 4, "signal": signal.SIGKILL}
    with contextlib.suppress(AssertionError):
        run_ranks(train, 1, output, [], plan, None, timeout=300)
        raise RuntimeError("the run was not killed")
    assert gone(int((output / "pid").read_text()))
    ((status, printed, _),) = run_ranks(train, 1, output, [], None, None, timeout=300)
    assert status == 0, printed
    assert "resuming after step 2" in printed
    assert runs.rollouts(output) == runs.rollouts(undisturbed)
    assert runs.metrics(output, "train/loss") == runs.metrics(undisturbed, "train/loss")
    assert runs.differences(undisturbed / "checkpoints" / "final", output / "checkpoints" / "final") == []


def test_two_shards_gather_weights_for_one_server(undisturbed: Path, tmp_path: Path) -> None:
    ranks = run_ranks(train, 2, tmp_path / "run", ["parallel.tensor=2"], None, None, timeout=300)
    assert [status for status, _, _ in ranks] == [0, 0]
    assert versions(tmp_path / "run") == versions(undisturbed)
    losses, expected = (dict(runs.metrics(output, "train/loss")) for output in (tmp_path / "run", undisturbed))
    assert losses == pytest.approx(expected, rel=1e-3)


def test_responses_after_a_killed_server_come_from_newer_weights(tmp_path: Path) -> None:
    """Those of step 3 are being generated in step 2; another server generates them with newer weights."""
    output = tmp_path / "run"
    ((status, printed, pids),) = run_ranks(train, 1, output, [], None, 1, timeout=300)
    assert status == 0, printed
    assert "lost the vLLM server: generate" in printed
    assert len(pids) == 2
    assert versions(output) == [{0}, {0}, {2}, {2}]
    assert ages(output) == [0, 1, 0, 1]


def test_a_signal_does_not_wait_for_the_next_steps_responses(tmp_path: Path) -> None:
    output = tmp_path / "run"
    plan = {"rank": 0, "where": "trained", "step": 3, "signal": signal.SIGTERM}
    ((status, printed, (pid,)),) = run_ranks(train, 1, output, [], plan, None, timeout=300)
    assert (status, "saved after step 3" in printed) == (SAVED_AND_STOPPED, True)
    assert gone(pid)
    ((status, printed, _),) = run_ranks(train, 1, output, [], None, None, timeout=300)
    assert status == 0, printed
    assert versions(output) == [{0}, {0}, {1}, {3}]
    assert ages(output) == [0, 1, 1, 0]
