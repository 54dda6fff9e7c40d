"""Unusual situations of jobs on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, STAND_IN, TWO, logs, submit

pytestmark = pytest.mark.slow

ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0")


@pytest.fixture(autouse=True)
def _an_idle_cluster(slurm: Cluster) -> None:
    slurm.wait_until_idle()


def test_a_task_of_an_array_is_requeued_alone(slurm: Cluster, tmp_path: Path) -> None:
    array = submit(slurm, tmp_path, *ONE, "--array=0-1", "conf.yaml", "output=run_%a", "act=wait")
    tasks = [f"{array}_{number}" for number in range(2)]

    def text(task: str, start: int = 0) -> str:
        return logs(tmp_path, f"../popsd-train-{task}/start-{start}/node-0.log")

    slurm.until(lambda: all("beginning at step 1" in text(task) for task in tasks), 60, "running tasks")
    for number, task in enumerate(tasks):
        assert f"asked: train conf.yaml output=run_{number} act=wait" in text(task)
    ports = {line for task in tasks for line in text(task).splitlines() if "MASTER_PORT=" in line}
    assert len(ports) == 2
    # One task has the id of the array, which by itself names all tasks.
    (own,) = [task for task in tasks if slurm.record(task)["JobId"] == array]
    (other,) = set(tasks) - {own}
    slurm.command("scancel", "--batch", "--signal=USR1", own)
    slurm.wait_for(own, "PENDING", "RUNNING", seconds=60, restarts=1)
    assert "saved and stopped; requeueing" in slurm.output(own)
    record = slurm.record(other)
    assert (record["JobState"], record["Restarts"]) == ("RUNNING", "0")
    assert "saved" not in text(other)
    slurm.command("scancel", array)


def test_an_array_on_one_output_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    array = submit(slurm, tmp_path, *ONE, "--array=7", "conf.yaml", "output=run")
    assert slurm.wait_for(f"{array}_7", "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert "job array: got the same output=run for every task" in slurm.output(f"{array}_7")


def test_ntasks_sets_the_number_of_ranks(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--ntasks=2", "conf.yaml")
    slurm.wait_for(job, "COMPLETED", seconds=60)
    log = logs(tmp_path, "start-0/node-0.log")
    assert (log.count("asked: train conf.yaml\n"), log.count("WORLD_SIZE=2\n")) == (2, 2)


def test_logs_that_another_node_does_not_see_are_named(slurm: Cluster, tmp_path: Path) -> None:
    # The second node gets another path, as if a local disk were mounted under that name.
    prologue = tmp_path / "prologue.sh"
    prologue.write_text('#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || echo export POPSD_RUN_DIR=/nowhere\n')
    prologue.chmod(0o755)
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", SLURM_TASK_PROLOG=str(prologue))
    assert slurm.wait_for(job, "FAILED", seconds=60)["ExitCode"] == "2:0"
    (line,) = slurm.output(job).splitlines()
    assert f"error: logs: got POPSD_LOGS={tmp_path}/logs, on node2 " in line
    assert line.endswith("need space on storage that all nodes share; set POPSD_LOGS")


def test_a_cancel_during_the_checks_is_not_a_failed_check(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", "act=slow_check")
    slurm.until(lambda: logs(tmp_path, "start-0/check-*.log").count("asked: doctor") == 2, 60, "checks")
    slurm.command("scancel", job)
    slurm.wait_until_idle()
    assert slurm.record(job)["JobState"] == "CANCELLED"
    printed = slurm.output(job)
    assert "the checks were interrupted; ended from outside, not requeued by itself" in printed
    assert "found" not in printed


def test_a_missing_python_is_named(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *ONE, "conf.yaml", POPSD_PYTHON="/nope/python")
    assert slurm.wait_for(job, "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert "  popsd: error: settings: got POPSD_PYTHON=/nope/python, which is missing; " in slurm.output(job)


def test_the_doctor_job_works_without_a_container(slurm: Cluster, tmp_path: Path) -> None:
    settings = {"POPSD_PYTHON": STAND_IN, "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh")}
    words = [str(ROOT / "slurm" / "doctor.sh"), "--imports", "--strict"]
    job = slurm.submit("--nodes=2", *words, cwd=tmp_path, **settings)
    slurm.wait_for(job, "COMPLETED", seconds=60)
    for node in range(2):
        assert f"{node}: asked: doctor --gpus 8 --imports --strict --sharing {node} 2 {job}.0" in slurm.output(job)
