"""How every command reports an error: one line and an exit status, or a traceback for a defect."""

import errno
import os
import sys
import types
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.errors import TransientError, UserError
from tests.cli.conftest import TINY
from tests.cli.misuse import error_of


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


def test_messages_of_several_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    cli._report(UserError("a", got="b\nc", need="d", fix="e"))
    assert capsys.readouterr().err == "popsd: error: a: got b c; need d; e\n"


def test_other_ranks_wait_for_rank_0_and_then_print(
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


def test_an_error_that_a_restart_may_fix_is_one_line_and_status_1(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: object, **options: object) -> None:
        raise TransientError("rank 3", got="it ended", fix="start again", advice=["its log:"])

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", train)
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 1
    assert capsys.readouterr().err == "popsd: error: rank 3: it ended; start again\nits log:\n"


def test_a_transient_file_system_error_is_not_a_defect(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "x.jsonl")

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", train)
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 1
    assert capsys.readouterr().err.startswith("popsd: error: train: Stale file handle: x.jsonl; start the same command")


def test_a_tracker_that_hangs_does_not_block_the_exit(calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_defects_keep_their_traceback(calls: list[tuple], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(config: object, **options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(sys.modules["nemo_popsd.commands.entry"], "train", train)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train", TINY, f"output={tmp_path}"])


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", TINY, "--steps=3"], ["export", "a", "b", "c"]])
def test_misused_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "; see popsd" in error_of(words, capsys)
