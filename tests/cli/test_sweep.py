"""`popsd train --seeds --grid`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.cli import sweep
from nemo_popsd.cli.main import parse
from nemo_popsd.cli.sweep import runs_of
from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import SAVED_AND_STOPPED, UserError
from tests.cli.conftest import TINY
from tests.report.test_arms import seeded

ROOT = Path(__file__).parents[2]


def test_the_runs_are_all_combinations_and_each_has_its_own_output() -> None:
    runs = runs_of([1, 2], ["optimizer.lr=1e-5,3e-5", "evaluation.markers=[Wait, Hmm],[Wait]"])
    assert len(runs) == 8
    assert runs[0].label == "lr_1e-5_markers_-Wait-Hmm/seed_1"
    assert runs[0].overrides == ["optimizer.lr=1e-5", "evaluation.markers=[Wait, Hmm]", "seed=1"]
    assert len({run.label for run in runs}) == 8
    assert [run.label for run in runs_of([3], [])] == ["seed_3"]
    assert [run.label for run in runs_of([], ["training.steps=1,2"])] == ["steps_1", "steps_2"]


@pytest.mark.parametrize(
    ("seeds", "grid", "message"),
    [
        ([1, 1], [], "seed=1 more than once"),
        ([1], ["seed=2"], "seed more than once"),
        ([], ["optimizer.lr"], "got --grid optimizer.lr; need key=value,value"),
        ([], ["optimizer.lr=1,,2"], "need key=value,value"),
        ([], ["output=a,b"], "set output as an override"),
        (list(range(201)), [], "201 runs; need different values, and at most 200 runs"),
        ([], ["name_of.x=a b,a-b"], "two runs with the output"),
    ],
)
def test_sweeps_that_are_refused(seeds: list[int], grid: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        runs_of(seeds, grid)
    assert message in str(caught.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the runs; each leaves a finished run, or ends with the status that its lr encodes."""
    commands: list[list[str]] = []

    def run(words: list[str]) -> int:
        commands.append(list(words))
        config = load_config(words[1], words[2:])
        if config.optimizer.weight_decay:
            return round(config.optimizer.weight_decay * 1000)
        seeded(Path(config.output), config.seed, after=0.6 + config.seed / 100, rate=config.optimizer.lr)
        return 0

    monkeypatch.setattr(sweep, "_run_in_process", run)
    return commands


def test_runs_are_trained_one_after_the_other_and_reported(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", TINY, f"output={tmp_path}", "name=mine", "--seeds", "1,2,3", "training.steps=4"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert [command[-3:] for command in started] == [
        [f"seed={n}", f"output={tmp_path}/seed_{n}", f"name=mine-seed_{n}"] for n in (1, 2, 3)
    ]
    for command in started:
        assert load_config(command[1], parse(command).overrides).training.steps == 4
    assert "run 3 of 3: popsd train" in out
    assert "(seeds 1, 2, 3)" in out
    assert "change +2.0 ± 2.5" in out
    assert out.splitlines()[-1] == f"report: {tmp_path}/report.html"
    assert "Over seeds" in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", TINY, f"output={tmp_path}", "--grid", "optimizer.weight_decay=0.002,0,0.001"]
    assert cli.main(words) == 2
    assert len(started) == 3
    out, err = capsys.readouterr()
    assert "run weight_decay_0.002 ended with status 2; its error is above" in err
    assert "run weight_decay_0.001 ended with status 1" in err
    assert f"report: {tmp_path}/report.html" in out


def test_a_run_that_a_signal_stops_stops_the_sweep(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", TINY, f"output={tmp_path}", "--grid", "optimizer.weight_decay=0.085,0"]
    assert cli.main(words) == SAVED_AND_STOPPED
    assert len(started) == 1
    assert "stopped in run 1 of 2; the same command continues there" in capsys.readouterr().out


def test_all_runs_are_checked_before_the_first(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", TINY, f"output={tmp_path}", "--grid", "training.steps=4,0"]) == 2
    assert "training.steps=0" in capsys.readouterr().err
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cli.main(["train", TINY, f"output={tmp_path}", "--seeds", "1,2"]) == 2
    assert "start each run with torchrun, or submit slurm/sweep.sh" in capsys.readouterr().err
    assert started == []
    with pytest.raises(SystemExit):
        cli.main(["train", TINY, "--seeds", "1,x"])
    assert "need whole numbers" in capsys.readouterr().err


def test_signals_reach_the_run_and_the_sweep_waits_for_it(tmp_path: Path) -> None:
    """The run writes the signal that it received, and exits with 85 like a training."""
    ready, got = tmp_path / "ready", tmp_path / "got"
    run = f"""
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path({str(got)!r}).write_text(signal.Signals(number).name)
    sys.exit(85)
signal.signal(signal.SIGUSR1, stop)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""
    parent = f"""
import subprocess, sys
from nemo_popsd.cli import sweep
with subprocess.Popen([sys.executable, "-c", {run!r}]) as process, sweep._signals_go_to(process):
    sys.exit(process.wait())
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # the terminal's, which reaches the run by itself: the sweep keeps waiting
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 85
    assert got.read_text() == "SIGUSR1"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_seeds_are_trained_and_the_same_command_leaves_them(tmp_path: Path) -> None:
    """Real runs in real processes."""
    words = ["-m", "nemo_popsd", "train", TINY, f"output={tmp_path}", "--seeds", "1,2", "training.steps=2"]
    words += ["training.prompts_per_step=2", "rollout.max_response_tokens=8", "evaluation.max_response_tokens=8"]
    words += ["evaluation.problems=2", "evaluation.samples_per_problem=1", "diagnosis.in_training=false"]
    for attempt in (1, 2):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "(seeds 1, 2)" in done.stdout
        assert done.stdout.count("is finished after 2 steps") == (2 if attempt == 2 else 0)
    assert [(tmp_path / f"seed_{seed}" / "DONE").read_text() for seed in (1, 2)] == ["2\n", "2\n"]
