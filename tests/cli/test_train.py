"""`popsd train`: the arguments that it passes on, its output directory, launcher and exit status."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from nemo_popsd.files.output_lock import OutputLock
from tests.cli.conftest import TINY


def test_train(calls: list[tuple], tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "training.steps=3"]
    assert cli.main(["train", TINY, *overrides]) == 0
    assert calls == [("train", load_config(TINY, overrides))]


def test_one_run_at_a_time_in_an_output(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = OutputLock(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", TINY, f"output={tmp_path}", "overwrite=true"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"another run in it, host {socket.gethostname()}, process {os.getpid()}" in err
    assert "set output to another directory" in err
    assert (calls, sorted(tmp_path.rglob("*"))) == ([], before)
    other.release()
    holds_lock: list[bool] = []
    entry = sys.modules["nemo_popsd.commands.entry"]
    monkeypatch.setattr(entry, "train", lambda config, lock: holds_lock.append(lock.hold.is_held()))
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 0
    assert holds_lock == [True]
    assert list(tmp_path.iterdir()) == [], "the lock was not released"


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_do_not_spin_unless_the_user_sets_it(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    # From Python and from the command alike: set before torch is imported, which reads it then.
    code = "import os, sys, nemo_popsd; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_the_world_size_of_the_launcher_is_checked(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    assert cli.main(["train", TINY, f"output={tmp_path}", "parallel.tensor=2"]) == 0
    assert cli.main(["train", TINY, f"output={tmp_path}", "training.prompts_per_step=31"]) == 2
    assert "training.prompts_per_step=30 or 32" in capsys.readouterr().err


def test_torchrun_reports_that_a_stopped_run_is_not_a_failure(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", lambda *args, **options: 85)
    assert cli.main(["train", TINY, f"output={tmp_path / 'run'}"]) == 85
    assert "saved and stopped" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_wandb_without_a_key_is_refused_before_the_work(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert cli.main(["train", TINY, f"output={tmp_path / 'run'}", "observability.wandb.enabled=true"]) == 2
    assert "set observability.wandb.mode=offline" in capsys.readouterr().err
    assert calls == []


@pytest.mark.slow
def test_ranks_of_torchrun_print_an_error_at_once_and_as_the_last_line_and_all_fail() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "nemo_popsd", "train", "none.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("popsd: error: configuration none.yaml")]
    assert len(lines) == 2, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0], "not after torchrun's report"
    assert "load_config" not in done.stderr
    reported = done.stderr.partition("Root Cause")[2].partition("=====")[0]
    assert lines[0] in reported, "torchrun's summary does not contain the error"
