"""torchrun starts the ranks again when one is killed or hangs, and the run resumes within the same start of the job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
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
    "training.steps=6",
    "training.self_check=false",
    "diagnosis.in_training=false",
]


def rank_of(launcher: int, rank: int) -> int:
    """Process ID of a rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize(("fault", "timeout"), [(signal.SIGKILL, 240), (signal.SIGSTOP, 30)], ids=["killed", "hung"])
def test_a_rank_that_is_killed_or_hangs_is_started_again_and_the_run_resumes(
    fault: signal.Signals, timeout: int, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    output, log = tmp_path / "run", tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    run = [f"--master-port={port}", "-m", "nemo_popsd", "train", TINY, f"output={output}", *WORDS]
    run.append(f"training.collective_timeout={timeout}")
    with (
        log.open("w") as file,
        subprocess.Popen([*launcher, *run], stdout=file, stderr=file, env=environment(), cwd=tmp_path) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while not (output / "metrics.jsonl").is_file() or len(metrics(output, "train/loss")) < 3:
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            os.kill(rank_of(process.pid, 1), fault)
            assert process.wait(timeout=240) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # it ends its ranks
    text = log.read_text()
    assert text.count("beginning at step 1") == 1
    assert text.count("resuming after step ") == 1
    assert [step for step, _ in metrics(output, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert (output / "DONE").is_file()
