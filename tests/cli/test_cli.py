import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.files.output_lock import OutputLock
from nemo_popsd.files.ownership import ADAPTER, EXPORT, sizes_of, write_mark
from nemo_popsd.observability import console
from tests.evaluation.scores import score
from tests.evaluation.server import Server
from tests.evaluation.test_comparison import saved
from tests.report.runs_on_disk import write_run

TINY = str(Path(__file__).parents[2] / "conf" / "tiny.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the sub-commands asked of the model, which is not built."""
    made: list[tuple] = []
    entry = types.ModuleType("nemo_popsd.commands.entry")
    for name in ("train", "evaluate", "diagnose", "export", "export_adapter"):
        setattr(entry, name, lambda *args, name=name, **options: made.append((name, *args)))
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.entry", entry)
    conversion = types.ModuleType("nemo_popsd.commands.conversion")
    for name in ("hf_to_nemo", "nemo_to_hf"):
        setattr(conversion, name, lambda *args, name=name, **options: made.append((name, *args, options)))
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.conversion", conversion)
    # It changes the logging of the whole process, which other tests read.
    monkeypatch.setattr(console, "set_up_console", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["evaluate"],
        ["diagnose"],
        ["report"],
        ["export"],
        ["convert"],
        ["convert", "hf-to-nemo"],
        ["plan"],
        ["config"],
        ["doctor"],
    ],
    ids=lambda words: "-".join(words),
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from nemo_popsd.cli.main import main
try:
    main({[*words, "--help"]!r})
except SystemExit as stop:
    assert stop.code == 0
heavy = [name for name in ("torch", "omegaconf", "lightning", "nemo", "megatron") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["usage: popsd", *words]))


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
    held: list[bool] = []
    entry = sys.modules["nemo_popsd.commands.entry"]
    monkeypatch.setattr(entry, "train", lambda config, lock: held.append(lock.hold.is_held()))
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 0
    assert held == [True]
    assert list(tmp_path.iterdir()) == [], "it is given back"


def test_threads_do_not_spin_and_the_user_may_say_otherwise(
    calls: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.main(["train", TINY, f"output={tmp_path}"])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    cli.main(["train", TINY, f"output={tmp_path}"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_diagnose(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output={tmp_path}", "diagnosis.rows=3"]
    assert cli.main(["diagnose", TINY, *overrides, "--checkpoint", str(tmp_path)]) == 0
    assert calls == [("diagnose", load_config(TINY, overrides), str(tmp_path))]
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "data.train.path=''"]) == cli.USER_ERROR
    assert "data.train" in capsys.readouterr().err
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "--checkpoint", "/nowhere"]) == cli.USER_ERROR
    assert "--checkpoint '/nowhere'" in capsys.readouterr().err


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "a", name="first"), write_run(tmp_path / "b", name="second")
    assert cli.main(["report", str(first)]) == 0
    assert capsys.readouterr().out == f"report: {first / 'report.html'}\n"
    page = tmp_path / "compared.html"
    assert cli.main(["report", str(first), str(second), "--output", str(page)]) == 0
    assert "first vs. second" in page.read_text()
    assert cli.main(["report", str(tmp_path)]) == cli.USER_ERROR
    assert "the output directory of a training run" in capsys.readouterr().err


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = f"""
import sys
from nemo_popsd.cli.main import main
assert main(["report", {str(tmp_path)!r}]) == 0
sys.exit("imported torch" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_evaluate_takes_overrides_on_both_sides_of_the_option(calls: list[tuple], tmp_path: Path) -> None:
    words = ["evaluate", TINY, f"output={tmp_path}", "--checkpoint", str(tmp_path), "evaluation.problems=4", "seed=5"]
    assert cli.main(words) == 0
    ((name, config, checkpoint),) = calls
    assert (name, checkpoint) == ("evaluate", str(tmp_path))
    assert (config.output, config.evaluation.problems, config.seed) == (str(tmp_path), 4, 5)
    cli.main(["evaluate", TINY, f"output={tmp_path}"])
    assert calls[-1][2] is None


def test_evaluate_with_an_endpoint_builds_no_model(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with Server() as server:
        words = [f"output={tmp_path}", f"evaluation.endpoint.url={server.url}", "evaluation.problems=2"]
        assert cli.main(["evaluate", TINY, *words]) == 0
    assert calls == []
    assert "accuracy (avg@1)" in capsys.readouterr().out


def test_compare_needs_no_configuration(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [[score("p"), score("q", right)] for right in (False, True)]
    directories = [saved(tmp_path / name / "validation", made) for name, made in zip("ab", scores, strict=True)]
    assert cli.main(["evaluate", "--compare", *directories]) == 0
    told = capsys.readouterr().out
    assert told.startswith("base: a/validation (the first")
    assert told.splitlines()[2].split() == ["a/validation", "b/validation", "change"]
    assert cli.main(["evaluate", "--compare", *directories, "--base", "b/validation"]) == 0
    assert capsys.readouterr().out.startswith("base: b/validation (by --base)")
    assert cli.main(["evaluate", TINY, "--base", "b"]) == 2
    assert "--base without --compare" in capsys.readouterr().err
    assert cli.main(["evaluate", TINY, "--compare", *directories]) == 2
    assert "leave the rest out" in capsys.readouterr().err
    assert cli.main(["evaluate"]) == 2
    assert "need CONF, or --compare" in capsys.readouterr().err
    assert calls == []


def test_export(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "hf"
    checkpoint.mkdir()
    assert cli.main(["export", str(checkpoint), str(output)]) == 0
    assert calls == [("export", str(checkpoint), str(output))]
    assert cli.main(["export", str(tmp_path / "none"), str(output)]) == 2
    assert "CHECKPOINT" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [[], ["--adapter"]])
def test_export_replaces_nothing_but_an_earlier_export(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: list[str]
) -> None:
    checkpoint, output = tmp_path / "run" / "checkpoint", tmp_path / "hf"
    checkpoint.mkdir(parents=True)
    for other in (checkpoint, checkpoint / "deeper", checkpoint.parent, tmp_path / "link"):
        if other.name == "link":
            other.symlink_to(checkpoint)
        assert cli.main(["export", *adapter, str(checkpoint), str(other)]) == 2
        assert "CHECKPOINT" in capsys.readouterr().err
    for place in (output, tmp_path / "hf.partial", tmp_path / "hf.replaced"):
        place.mkdir()
        (place / "weights.bin").write_text("three weeks")
        assert cli.main(["export", *adapter, str(checkpoint), str(output)]) == 2
        told = capsys.readouterr().err
        assert f"{place}: got a directory without the mark .nemo_popsd" in told
        assert "nothing was removed" in told
        assert (place / "weights.bin").exists()
        shutil.rmtree(place)
    (output / "config.json").parent.mkdir()
    (output / "config.json").write_text("{}")
    write_mark(output, ADAPTER if adapter else EXPORT, sizes_of(output))
    assert cli.main(["export", *adapter, str(checkpoint), str(output)]) == 0
    assert len(calls) == 1
    assert cli.main(["export", *([] if adapter else ["--adapter"]), str(checkpoint), str(output)]) == 2


def test_a_report_replaces_nothing_but_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "thesis.html"
    page.write_text("<html>three weeks</html>")
    assert cli.main(["report", str(tmp_path), "--output", str(page)]) == 2
    assert "a file that is not a page of nemo_popsd" in capsys.readouterr().err
    assert page.read_text() == "<html>three weeks</html>"
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "pipe")]) == 2
    assert "something other than a regular file" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_popsd.report.write_report", interrupt)
    assert cli.main(["report", "somewhere"]) == 130
    assert capsys.readouterr().err == "popsd report: stopped by Ctrl-C\n"


def test_convert(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = str(tmp_path), str(tmp_path / "out")
    assert cli.main(["convert", "hf-to-nemo", source, output]) == 0
    assert cli.main(["convert", "hf-to-nemo", source, output, "--verify", "--precision", "bf16"]) == 0
    assert cli.main(["convert", "nemo-to-hf", source, output, "--trust-remote-code", "--shard-size", "0.5"]) == 0
    plain = {"precision": None, "verifies": False, "trust_remote_code": False}
    assert calls == [
        ("hf_to_nemo", source, output, plain),
        ("hf_to_nemo", source, output, {**plain, "precision": "bf16", "verifies": True}),
        ("nemo_to_hf", source, output, {**plain, "trust_remote_code": True, "shard_bytes": 1 << 29}),
    ]
    assert cli.main(["convert", "hf-to-nemo", source, source]) == 2
    assert "which exists" in capsys.readouterr().err
    assert cli.main(["convert", "nemo-to-hf", str(tmp_path / "none"), output]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_config_prints_what_loads_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", TINY, "training.steps=3", "data.train.answer_pattern=#### (.+)"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(TINY, ["training.steps=3", "data.train.answer_pattern=#### (.+)"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", TINY, "traning.steps=3"], "the nearest is training.steps"),
        (["train", "none.yaml"], "configuration none.yaml: got no readable file"),
        (["train", TINY, "student.source=none"], "set student.source"),
        (["train", TINY, "parallel.tensor=2"], "parallel.tensor=2 with 1 rank"),
        (["evaluate", TINY, "data.validation.path="], "set data.validation.path"),
        (["evaluate", TINY, "--checkpoint", "none"], "--checkpoint 'none'"),
    ],
)
def test_user_errors_are_one_line(
    calls: list[tuple], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, calls) == ("", [])
    assert err.startswith("popsd: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert message in err


def test_the_world_of_the_launcher_counts(
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


def test_messages_of_several_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    cli._tell(UserError("a", got="b\nc", need="d", fix="e"))
    assert capsys.readouterr().err == "popsd: error: a: got b c; need d; e\n"


def test_other_ranks_give_rank_0_time_and_are_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["config", "none.yaml"]) == 2
    assert slept == []
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["config", "none.yaml"]) == 2
    assert slept == [cli._GRACE_SECONDS]
    assert capsys.readouterr().err.endswith("(rank 1)\n")


def test_what_another_start_may_cure_is_one_line_and_status_1(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object, **options: object) -> None:
        raise TransientError("rank 3", got="it ended", fix="start again", advice=["its log:"])

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", fail)
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 1
    assert capsys.readouterr().err == "popsd: error: rank 3: it ended; start again\nits log:\n"


def test_a_file_system_that_fails_for_a_moment_is_no_defect(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "x.jsonl")

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", fail)
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 1
    assert capsys.readouterr().err.startswith("popsd: error: train: Stale file handle: x.jsonl; start the same command")


def test_torchrun_is_told_that_a_stopped_run_is_no_failure(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", lambda *args, **options: 85)
    assert cli.main(["train", TINY, f"output={tmp_path / 'run'}"]) == 85
    assert "saved and stopped" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_tracker_that_hangs_does_not_hold_up_the_end(calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    assert cli.main(["config", "none.yaml"]) == 2
    assert ended == []
    hanging = types.ModuleType("nemo_popsd.observability.trackers")
    hanging.any_hangs = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, hanging.__name__, hanging)
    cli.main(["config", "none.yaml"])
    assert ended == [2]


def test_a_launcher_that_contradicts_itself_is_one_line(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    for words in (["train", TINY, f"output={tmp_path}"], ["evaluate", TINY], ["diagnose", TINY]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "RANK='0' without WORLD_SIZE, LOCAL_RANK" in err
    assert calls == []


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


def test_defects_keep_their_traceback(calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(config: object, **options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train", TINY, f"output={tmp_path}"])


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", TINY, "--steps=3"], ["export", "a", "b", "c"]])
def test_misused_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("popsd: error: ")
    assert err.count("\n") == 1
    assert "; see popsd" in err


def test_ranks_of_torchrun_tell_an_error_once_and_all_fail() -> None:
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
    assert len(lines) == 1, done.stderr
    assert "load_config" not in done.stderr
    reported = done.stderr.partition("Root Cause")[2]
    assert lines[0] in reported, "what torchrun itself says in the end"
