"""The end of a job by the statuses of its ranks and checks: done, requeued, or ended with a status and a message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.slurm.functions import Job

STEPS = "load_settings; choose_ranks train; set_up_logs; sleep() { :; }; "


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def ranks(job: Job, *statuses: int) -> None:
    for rank, status in enumerate(statuses):
        (job.start / f"rank-{rank}.exit").write_text(f"{status} 0 node1\n")


@pytest.mark.parametrize(
    ("statuses", "code", "message"),
    [
        ((0, 0), 0, "done: "),
        ((85, 85), 85, "saved and stopped; requeueing"),
        ((0, 85), 85, "saved and stopped; requeueing"),
        ((2, 143), 2, "a restart would not change this"),
        ((143, 2), 2, "a restart would not change this"),
        ((1, 143), 9, "failed (1 in a row); requeueing"),
        ((85, 1), 9, "failed (1 in a row); requeueing"),
        ((0,), 9, "failed (1 in a row); requeueing"),
        ((), 9, "failed (1 in a row); requeueing"),
    ],
)
def test_the_statuses_of_the_ranks_end_the_job(job: Job, statuses: tuple[int, ...], code: int, message: str) -> None:
    ranks(job, *statuses)
    done = job.run(STEPS + "conclude 9")
    assert done.returncode == code, done
    assert message in done.stdout + done.stderr
    assert ("asked: scontrol requeue 12\n" in done.stdout) == ("requeueing" in message)


def test_only_the_task_itself_of_an_array_is_requeued(job: Job) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    start = job.place / "logs" / "popsd-train-12_3" / "start-0"
    start.mkdir(parents=True)
    for rank in range(2):
        (start / f"rank-{rank}.exit").write_text("85 0 node1\n")
    job.program("scontrol", 'echo "$*" >>asked; echo "JobState=RUNNING"')
    assert job.run(STEPS + "conclude 0", **array).returncode == 85
    assert (job.place / "asked").read_text().splitlines() == ["show job 12_3", "requeue 12_3"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED"])
def test_a_job_that_slurm_ends_is_not_requeued(job: Job, state: str) -> None:
    job.program("scontrol", f'[[ $1 == show ]]; echo "JobState={state}"')
    ranks(job, 85, 85)
    done = job.run(STEPS + "conclude 0")
    assert (done.returncode, done.stderr) == (85, "")
    assert "saved and stopped; ended from outside, not requeued by itself" in done.stdout


def test_a_controller_without_an_answer_does_not_end_the_job(job: Job) -> None:
    job.program("scontrol", 'if mkdir asked 2>/dev/null; then exit 1; fi; echo "JobState=RUNNING, asked: $*"')
    ranks(job, 85, 85)
    assert "asked: requeue 12\n" in job.run(STEPS + "conclude 0").stdout


def test_a_full_disk_for_logs_does_not_hide_the_end_of_the_run(job: Job) -> None:
    full = STEPS + 'ln -s /dev/full "$RUN_DIR/.space-0"; ln -s /dev/full "$JOB_DIR/DONE"; '
    ranks(job, 1, 0)
    done = job.run(full + "conclude 1")
    assert done.returncode == 2
    assert f"logs: got POPSD_LOGS={job.place}/logs, on node1 No space left on device; " in done.stderr
    shutil.rmtree(job.place / "logs")
    ranks(job, 0, 0)
    done = job.run(full + "conclude 0")
    assert done.returncode == 0
    assert "cannot be written" in done.stdout


def test_the_error_of_a_rank_is_shown_first(job: Job) -> None:
    ranks(job, 143, 1)
    (job.start / "node-0.log").write_text(
        "0: popsd: error: ranks: got no answer within 60 s; need one; set training.collective_timeout\n"
        "1: popsd: error: ranks: got no answer within 60 s; need one; set training.collective_timeout\n"
        + "".join(f"0: line {number}\n" for number in range(50))
    )
    (job.start / "node-1.log").write_text("3: popsd: error: another\n")
    shown = job.run(STEPS + "conclude 1").stderr.splitlines()
    assert shown[0] == "0: popsd: error: ranks: got no answer within 60 s; need one; set training.collective_timeout"
    assert shown[1] == "3: popsd: error: another"
    assert "error: rank-0 on node1 ended first, with 143; the last lines of its node:" in shown[2]
    assert shown[3:] == [f"0: line {number}" for number in range(30, 50)]


def check(job: Job, node: int, status: int | None, log: str) -> None:
    (job.start / f"check-{node}.log").write_text(f"node {node} is node{node + 1}\n{log}")
    if status is not None:
        (job.start / f"check-{node}.exit").write_text(f"{status}\n")


def test_the_problems_of_the_checks_are_shown_once(job: Job) -> None:
    table = (
        "machine\n"
        "  failed    CUDA devices     none     need 8; see nvidia-smi and CUDA_VISIBLE_DEVICES\n"
        + "".join(f"  ok        package {number}\n" for number in range(20))
        + f"run\n  missing   data             data.train.path='{'x' * 500}'      need a file; set data.train.path\n"
        "failed: CUDA devices, data\n"
    )
    for node in range(2):
        check(job, node, 1, table)
    check(job, 2, 2, "popsd: error: settings: got POPSD_PYTHON=/nope; set POPSD_PYTHON\n")
    done = job.run(STEPS + "conclude_check 1")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].endswith("error: found on node1 (check-0.log) node2 (check-1.log):")
    assert lines[1:3] == [
        "    failed  CUDA devices  none  need 8; see nvidia-smi and CUDA_VISIBLE_DEVICES",
        f"    missing  data  data.train.path='{'x' * 500}'  need a file; set data.train.path",
    ]
    assert lines[3].endswith("error: found on node3 (check-2.log):")
    assert lines[4] == "  popsd: error: settings: got POPSD_PYTHON=/nope; set POPSD_PYTHON"
    assert "error: the checks before the start found the problems above" in lines[5]


def test_a_check_that_could_not_run_is_repeated(job: Job) -> None:
    check(job, 0, 137, "first\nKilled\n")
    check(job, 1, None, "")
    done = job.run(STEPS + "conclude_check 137")
    assert done.returncode == 137
    assert "the checks could not run (1 in a row); requeueing" in done.stdout
    assert "  Killed\n" in done.stderr
    assert (job.start.parent / "crashes").read_text() == "1\n"


def test_a_cancel_during_the_check_is_not_a_failed_check(job: Job) -> None:
    job.program("srun", "exit 143")
    job.program("scontrol", 'echo "JobState=CANCELLED"')
    done = job.run(STEPS + "CONTAINER=(); TERMINATED=; check_nodes train conf.yaml")
    assert (done.returncode, done.stderr) == (143, "")
    assert "the checks were interrupted; ended from outside, not requeued by itself" in done.stdout
