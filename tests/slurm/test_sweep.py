"""The job arrays that slurm/sweep.sh submits: the runs of `popsd train --seeds --grid`, with a stand-in for sbatch, and
once with a real Slurm."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nemo_popsd.cli.sweep import own_overrides, runs_of
from nemo_popsd.config.loading import load_config
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import JOB_ENVIRONMENT, logs
from tests.slurm.stand_in_sbatch import ROOT, submitted


def sweep(place: Path, *words: str, text: str = "name: mine\n") -> tuple[int, str, str, list[list[str]]]:
    """Status, output, errors and the submitted arrays, each as the words of sbatch."""
    done, jobs = submitted("sweep.sh", place, *words, text=text, answer="12;cluster")
    return done.returncode, done.stdout, done.stderr, jobs


@pytest.mark.parametrize("grid", [[], ["optimizer.lr=1e-5,3e-5"], ["optimizer.lr=1e-5,3e-5", "training.steps=2,4"]])
def test_the_arrays_are_the_runs_of_popsd_train(grid: list[str], tmp_path: Path) -> None:
    flags = [f"--grid={axis}" for axis in grid]
    status, out, errors, jobs = sweep(tmp_path, "--seeds=1,2", *flags, "--nodes=2", "conf.yaml", "training.steps=8")
    assert (status, errors) == (0, "")
    expected = runs_of([1, 2], grid)
    assert len(jobs) == len(expected) // 2
    found = []
    for job in jobs:
        assert job[:3] == ["--parsable", "--array=1,2", "--nodes=2"]
        assert job[3:6] == [str(ROOT / "slurm" / "train.sh"), "conf.yaml", "training.steps=8"]
        found += [[word.replace("%a", seed) for word in job[6:]] for seed in ("1", "2")]
    assert found == [own_overrides(run, output="runs/mine", name="mine") for run in expected]
    *submitted, last = out.splitlines()
    assert all(line.endswith(" 12") for line in submitted)
    report = shlex.split(last.partition("popsd ")[2])
    assert report == ["report", *(f"runs/mine/{run.label}" for run in expected), "--output", "runs/mine/report.html"]


def test_the_output_is_that_of_the_configuration(tmp_path: Path) -> None:
    status, _, _, [job] = sweep(tmp_path, "--seeds=7", "--throttle=1", "conf.yaml", text="seed: 1\n")
    assert status == 0
    assert "--array=7%1" in job
    assert f"output={load_config(tmp_path / 'conf.yaml').output}/seed_%a" in job
    assert "name=conf-seed_%a" in job


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conf.yaml"], "got --seeds=; need whole numbers"),
        (["--seeds=1,x", "conf.yaml"], "got --seeds=1,x"),
        (["--seeds=1", "absent.yaml"], "got an unreadable absent.yaml"),
        (["--seeds=1", "--array=1-3", "conf.yaml"], "give --throttle=N for its limit"),
        (["--seeds=1", "--grid=optimizer.lr=1,,2", "conf.yaml"], "need key=a,b without blanks"),
    ],
)
def test_what_cannot_be_submitted_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    status, _, errors, jobs = sweep(tmp_path, *words)
    assert (status, jobs) == (2, [])
    assert message in errors


@pytest.mark.slow
def test_slurm_runs_each_seed_of_each_point(slurm: Cluster, tmp_path: Path) -> None:
    slurm.wait_until_idle()
    (tmp_path / "conf.yaml").write_text("name: mine\n")
    words = ["--seeds=1,2", "--grid=optimizer.lr=1e-5,3e-5", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    printed = slurm.command(
        str(ROOT / "slurm" / "sweep.sh"), *words, "conf.yaml", "seed=0", cwd=tmp_path, **JOB_ENVIRONMENT
    )
    arrays = dict(line.split() for line in printed.splitlines()[:-1])
    assert list(arrays) == ["lr_1e-5", "lr_3e-5"]
    for label, job in arrays.items():
        for seed in "12":
            slurm.wait_for(f"{job}_{seed}", "COMPLETED", seconds=60)
            log = (tmp_path / "logs" / f"popsd-train-{job}_{seed}" / "start-0" / "node-0.log").read_text()
            own = f"seed={seed} output=runs/mine/{label}/seed_{seed} name=mine-{label}-seed_{seed}"
            assert f"asked: train conf.yaml seed=0 optimizer.lr={label[3:]} {own}\n" in log
    assert len(list(tmp_path.glob("logs/*"))) == 4, logs(tmp_path, "start-0/node-0.log")
