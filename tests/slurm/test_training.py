"""Two nodes train the embedded model through sbatch. One job is interrupted in all supported ways, and its losses equal
those of an uninterrupted job.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_popsd.planning.failures import Rates, replay
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 5
SETTINGS = [
    f"training.steps={STEPS}",
    "training.prompts_per_step=4",
    f"training.checkpoint_every={EVERY}",
    "training.export_huggingface=false",
    "rollout.max_response_tokens=24",
    "data.validation.path=",
    "observability.progress_bar=false",
]
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=60", "--signal=B:USR1@120")


PYTHON = """#!/bin/sh
# The nodes are checked in the first start of the first job: further checks would only import all packages again.
case "$3-${SLURM_RESTART_COUNT:-0}" in
doctor-CHECKED_START) ;;
doctor-*) exit 0 ;;
esac
exec EXECUTABLE "$@"
"""


def submit(slurm: Cluster, place: Path, *flags: str, is_checked: bool = True) -> str:
    place.mkdir()
    python = place / "python"
    text = PYTHON.replace("EXECUTABLE", sys.executable)
    python.write_text(text.replace("CHECKED_START", "0" if is_checked else "none"))
    python.chmod(0o755)
    environment = {
        "POPSD_PYTHON": str(python),
        "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh"),
        "POPSD_MIN_FREE_GIB": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Only the first start may overwrite.
    output = [f"output={place / 'run'}", "overwrite=true"]
    words = [str(ROOT / "slurm" / "train.sh"), str(ROOT / "conf" / "tiny.yaml"), *output, *SETTINGS]
    return slurm.submit(*TWO, *flags, *words, cwd=place, **environment)


def losses(place: Path) -> dict[int, float]:
    """The logged losses by step."""
    file = place / "run" / "metrics.jsonl"
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # a partial line
            continue
        if "train/loss" in entry:
            found[entry["step"]] = entry["train/loss"]
    return found


def until_it_trains(slurm: Cluster, place: Path, job: str, start: int, steps: int = 3) -> int:
    """Waits for some steps of that start of the job; returns the step after which it started."""
    logs = place / "logs" / f"popsd-train-{job}" / f"start-{start}"
    slurm.wait_for(job, "RUNNING", seconds=300, restarts=start)

    def start_line() -> re.Match[str] | None:
        log = logs / "node-0.log"
        return re.search(r"resuming after step (\d+)|beginning at step 1", log.read_text() if log.is_file() else "")

    def trains() -> bool:
        assert slurm.record(job)["JobState"] in ("RUNNING", "COMPLETED"), slurm.output(job)
        match = start_line()
        return match is not None and max(losses(place), default=0) >= int(match[1] or 0) + steps

    slurm.until(trains, 300, f"steps of start {start} of job {job}")
    match = start_line()
    assert match is not None
    return int(match[1] or 0)


def ranks_of(output: Path) -> list[int]:
    """Process ids of the ranks that write to `output`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(sys.executable) == words[0] and f"output={output}".encode() in words and b"train" in words:
                found.append(int(entry.name))
    return sorted(found)


def simulated(steps: int) -> set[int]:
    """Steps that a job repeats after failing at `steps`; two numbers if it may have been saving."""
    rates = Rates(step=1.0, save=0.5, requeue=1.0, between_failures=1.0)
    saves = steps // EVERY
    found = {replay(rates, EVERY, [steps + 0.5 * saves + 0.25]).repeated}
    if steps and steps % EVERY == 0:
        found.add(replay(rates, EVERY, [steps + 0.5 * (saves - 1) + 0.25]).repeated)
    return found


@contextmanager
def paused(processes: list[int]) -> Iterator[None]:
    assert len(processes) == 2
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_an_interrupted_job_has_the_losses_of_an_uninterrupted_one(slurm: Cluster, tmp_path: Path) -> None:
    slurm.wait_until_idle()
    place, plain = tmp_path / "survivor", tmp_path / "plain"
    job = submit(slurm, place)
    assert until_it_trains(slurm, place, job, start=0) == 0

    # The time limit approaches. Slurm checks it every 30 seconds, in which the ranks must not end.
    hours, minutes, _ = map(int, slurm.record(job)["RunTime"].split(":"))
    slurm.command("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    with paused(ranks_of(place / "run")):
        slurm.until(lambda: "asking all ranks to save and stop" in slurm.output(job), 60, "signal")
    slurm.wait_for(job, "PENDING", "RUNNING", seconds=150, restarts=1)
    slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert "saved and stopped; requeueing" in slurm.output(job)
    reached = max(losses(place))
    assert until_it_trains(slurm, place, job, start=1) == reached

    # A rank dies: the other one, on another node, ends with it.
    ranks = ranks_of(place / "run")
    with paused(ranks):
        died = max(losses(place))
    os.kill(ranks[1], signal.SIGKILL)
    slurm.wait_for(job, "PENDING", "RUNNING", seconds=120, restarts=2)
    assert not set(ranks) & set(ranks_of(place / "run"))
    assert "failed (1 in a row); requeueing" in slurm.output(job)
    resumed = until_it_trains(slurm, place, job, start=2)
    assert resumed >= reached
    assert resumed % EVERY == 0 or resumed == reached
    # It repeats the steps that the simulation of `popsd plan --failures` has, unless the stop before saved later ones.
    assert resumed in {*(done - repeated for done in (died, died + 1) for repeated in simulated(done)), reached}

    # An urgent job, which is not interrupted, takes two of the three nodes.
    reached = max(losses(place))
    other = submit(slurm, plain, "--partition=urgent", is_checked=False)
    slurm.wait_for(job, "PENDING", seconds=120, restarts=2)
    slurm.wait_for(other, "COMPLETED", seconds=600)
    assert slurm.record(other)["Restarts"] == "0"
    assert set(losses(plain)) == set(range(1, STEPS + 1))
    assert until_it_trains(slurm, place, job, start=3) >= reached

    # A node fails. The job continues without it.
    node = slurm.record(job)["BatchHost"]
    slurm.update_node(node, "down")
    try:
        assert until_it_trains(slurm, place, job, start=4) > reached
        assert slurm.record(job)["BatchHost"] != node
        slurm.wait_for(job, "COMPLETED", seconds=300)
    finally:
        slurm.update_node(node, "resume")

    assert (place / "logs" / f"popsd-train-{job}" / "DONE").read_text().startswith(f"job {job}, start 4")
    assert (place / "run" / "DONE").read_text() == f"{STEPS}\n"
    assert losses(place) == losses(plain)
