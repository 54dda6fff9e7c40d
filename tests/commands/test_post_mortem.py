"""`popsd doctor --run` after real faults of complete runs. From texts alone: `tests/doctor/test_post_mortem.py`."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.doctor.post_mortem import PostMortem, examine_remains
from nemo_popsd.doctor.remains import read_remains
from tests.command_runner import become_command
from tests.fork_servers import CONTEXT, LOCAL, die_with_parent, forked_by
from tests.model.runs import SETTINGS, TINY, _send_signal

pytestmark = pytest.mark.slow

WORDS = (
    *SETTINGS,
    "data.validation.path=",
    "training.checkpoint_every=1",
    "training.self_check=false",
    "diagnosis.in_training=false",
    "observability.tensorboard=false",
    "rollout.save=false",
)


def train(output: Path, *words: str, ranks: int = 1, fault: dict[str, Any] | None = None) -> list[int]:
    """`popsd train` in processes that connect by themselves; their statuses, negative for a signal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        arguments = (["train", TINY, f"output={output}", *WORDS, *words], rank, ranks, port, fault or {})
        process: Any = CONTEXT.Process(target=_rank, args=(*arguments, str(output.parent / f"log-{rank}")))
        with forked_by(LOCAL):
            process.start()
        processes.append(process)
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _rank(words: Sequence[str], rank: int, ranks: int, port: int, fault: dict[str, Any], log: str) -> None:
    die_with_parent()
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault.get("rank") == rank:
        _send_signal(fault)
    if "full" in fault:
        _fill_disk()
    if "nan" in fault:
        _break_gradient()
    become_command(words, Path(log), append=True)


def _fill_disk() -> None:
    """The first line of metrics meets a full disk."""
    from nemo_popsd.observability.jsonl_logger import JsonlLogger

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    JsonlLogger._prepare = full  # type: ignore[method-assign]


def _break_gradient() -> None:
    """The loss of each trajectory is NaN."""
    import torch

    from nemo_popsd.training import step

    check = step.refuse_non_finite

    def broken(index: int, reports: Any, rows: Any, norm: float) -> None:
        for report in reports:
            report.per_token.fill_(torch.nan)
        check(index, reports, rows, norm)

    step.refuse_non_finite = broken


def examine(output: Path) -> PostMortem:
    return examine_remains(read_remains(output))


def test_a_killed_rank(tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = {"rank": 1, "step": 2, "where": "trained", "signal": signal.SIGKILL}
    statuses = train(output, "parallel.tensor=2", ranks=2, fault=fault)
    assert statuses == [1, -signal.SIGKILL]
    killed, peer = examine(output).causes
    assert (killed.name, peer.name) == ("killed", "peer")
    assert killed.what.startswith("rank 1 ended without a report")
    assert killed.evidence[0].file == output / "ranks" / "rank-00001.jsonl"
    assert peer.evidence[0].file == output / "ranks" / "rank-00000.jsonl"


def test_a_stopped_run_a_damaged_checkpoint_and_the_finished_run(tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = {"rank": 0, "step": 2, "where": "trained", "signal": signal.SIGTERM}
    assert train(output, fault=fault) == [85]
    result = examine(output)
    assert (result.state, result.remains.stopped, result.remains.resumable) == ("stopped", True, ("step-000002", 2))
    weights = next((output / "checkpoints" / "step-000002" / "weights").glob("*.distcp"))
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1])
    assert train(output) == [2]
    (cause,) = examine(output).causes
    assert cause.name == "user_error"
    assert weights.name in cause.evidence[0].text
    assert "checkpoints/step-000002" in cause.evidence[0].text
    weights.write_bytes(intact)
    assert train(output) == [0]
    result = examine(output)
    assert (result.state, len(result.remains.attempts)) == ("finished", 3)


@pytest.mark.parametrize(
    ("words", "fault", "status", "name"),
    [
        ([], {"nan": True}, 1, "not_finite"),
        (["guard.mismatch_stop=0"], {}, 2, "mismatch"),
        ([], {"full": True}, 2, "disk_full"),
    ],
    ids=["NaN", "mismatch", "full disk"],
)
def test_runs_that_stop_by_themselves(
    tmp_path: Path, words: list[str], fault: dict[str, Any], status: int, name: str
) -> None:
    output = tmp_path / "run"
    assert train(output, *words, fault=fault) == [status], (tmp_path / "log-0").read_text()
    result = examine(output)
    assert [cause.name for cause in result.causes] == [name]
    (line,) = result.causes[0].evidence
    assert (line.file, line.number) == (output / "ranks" / "rank-00000.jsonl", 2)
