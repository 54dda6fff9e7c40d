"""The output of the ranks of a run when one of them hangs."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.doctor.post_mortem import examine_remains
from nemo_popsd.doctor.remains import read_remains
from tests.harness import run_ranks
from tests.model import runs

pytestmark = pytest.mark.slow

WORDS = (
    "parallel.tensor=2",
    "data.validation.path=",
    "training.checkpoint_every=0",
    "training.self_check=false",
    "diagnosis.in_training=false",
    "training.collective_timeout=4",
)


def hang(rank: int, world_size: int, output: Path, port: int) -> Any:
    """Rank 1 is stopped in the second step; rank 0 continues it at its own end. They connect without the harness."""
    import torch.distributed as dist

    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    plan = {"rank": 1, "step": 2, "where": "trained", "signal": signal.SIGSTOP}
    result = runs._train(rank, world_size, output, WORDS, plan)
    if rank == 0:
        dist.destroy_process_group()  # as the end of the process would
        os.kill(pids[1], signal.SIGCONT)
    return result


def test_a_rank_that_hangs_is_reported_with_the_setting_and_ends_when_it_wakes(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    printed = run_ranks(hang, 2, tmp_path, port, timeout=240)
    lines = []
    for status, text in printed:
        assert status == 1, text
        assert "Traceback" not in text
        lines += [line for line in text.splitlines() if line.startswith("popsd: error: ")]
    assert len(lines) == 2
    assert "rank 0 of 2: it waited longer than training.collective_timeout=4 s for another rank" in lines[0]
    assert "rank 1 of 2: another rank has ended, or the connection to it is lost" in lines[1]
    assert lines[1].endswith("(rank 1)")
    assert [step for step, _ in runs.metrics(tmp_path, "train/loss")] == [1]
    causes = examine_remains(read_remains(tmp_path)).causes
    assert [cause.name for cause in causes] == ["timeout", "peer"]
    assert causes[0].evidence[0].file == tmp_path / "ranks" / "rank-00000.jsonl"
