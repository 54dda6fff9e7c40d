"""torchrun starts the ranks again when one is killed or hangs, and the run resumes within the same start of the job.
Where no start is left, the death of one ends all.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_commands import environment
from tests.model.runs import SETTINGS, TINY, metrics

pytestmark = pytest.mark.slow

WORDS = [
    *(word for word in SETTINGS if not word.startswith("overwrite=")),
    "overwrite=true",  # of the first start alone
    "data.validation.path=",
    "parallel.tensor=2",
    "training.self_check=false",
    "diagnosis.in_training=false",
]


def rank_of(launcher: int, rank: int) -> int:
    """Process ID of a rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


@contextlib.contextmanager
def started(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with two ranks that train into `folder`/run, their output in `folder`/log, and one restart."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    run = [f"--master-port={port}", "-m", "nemo_popsd", "train", TINY, f"output={folder / 'run'}", *WORDS, *words]
    with (
        (folder / "log").open("w") as file,
        subprocess.Popen([*launcher, *run], stdout=file, stderr=file, env=environment(), cwd=folder) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # it ends its ranks


def wait_for_step(step: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns when the step after `step` is logged."""
    file, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 240
    while not file.is_file() or not any(logged > step for logged, _ in metrics(folder / "run", "train/loss")):
        assert time.monotonic() < deadline, (folder / "log").read_text()
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.5)


def test_a_rank_that_hangs_is_started_again_and_the_run_resumes(tmp_path: Path) -> None:
    with started(tmp_path, "training.steps=6", "training.collective_timeout=30") as process:
        wait_for_step(2, tmp_path, process)
        os.kill(rank_of(process.pid, 1), signal.SIGSTOP)
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert text.count("beginning at step 1") == 1
    assert text.count("resuming after step ") == 1
    assert [step for step, _ in metrics(tmp_path / "run", "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "DONE").is_file()


def test_a_killed_rank_is_started_again_and_its_second_death_ends_all(tmp_path: Path) -> None:
    with started(tmp_path, "training.steps=100000") as process:
        wait_for_step(2, tmp_path, process)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        deadline = time.monotonic() + 240
        while not (resumed := re.search(r"resuming after step (\d+)", (tmp_path / "log").read_text())):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        wait_for_step(int(resumed[1]) + 1, tmp_path, process)
        ranks = [rank_of(process.pid, rank) for rank in (0, 1)]
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(60) != 0
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    text = (tmp_path / "log").read_text()
    assert "SIGKILL" in text or "exitcode: -9" in text
    steps = [step for step, _ in metrics(tmp_path / "run", "train/loss")]
    assert steps == [*range(1, len(steps) + 1)]
    assert not (tmp_path / "run" / "DONE").exists()
