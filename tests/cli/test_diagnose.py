"""`popsd diagnose`."""

import sys
import types
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from tests.cli.conftest import TINY


def test_diagnose(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output={tmp_path}", "diagnosis.rows=3"]
    assert cli.main(["diagnose", TINY, *overrides, "--checkpoint", str(tmp_path)]) == 0
    assert calls == [("diagnose", load_config(TINY, overrides), str(tmp_path))]
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "data.train.path=''"]) == cli.USER_ERROR
    assert "data.train" in capsys.readouterr().err
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "--checkpoint", "/nowhere"]) == cli.USER_ERROR
    assert "--checkpoint '/nowhere'" in capsys.readouterr().err


def test_fp8_is_measured_on_the_untrained_model(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = types.ModuleType("nemo_popsd.commands.fp8")
    command.diagnose_fp8 = lambda *args: calls.append(("diagnose_fp8", *args))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.fp8", command)
    overrides = [f"output={tmp_path}", "fp8.frozen=true", "student.precision=bf16"]
    assert cli.main(["diagnose", TINY, *overrides, "--fp8"]) == 0
    assert calls == [("diagnose_fp8", load_config(TINY, overrides))]
    for words, message in (
        (["--checkpoint", str(tmp_path)], "frozen passes use the untrained model"),
        (["--views", "answer"], "--fp8 in addition"),
    ):
        assert cli.main(["diagnose", TINY, f"output={tmp_path}", "--fp8", *words]) == cli.USER_ERROR
        assert message in capsys.readouterr().err


def test_views_are_scored_before_training(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = types.ModuleType("nemo_popsd.commands.views")
    command.score_views = lambda *args: calls.append(("score_views", *args))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.views", command)
    overrides = [f"output={tmp_path}", "data.train.columns.answer=answer"]
    assert cli.main(["diagnose", TINY, *overrides, "--views", "solution, answer,none"]) == 0
    assert calls == [("score_views", load_config(TINY, overrides), ["solution", "answer", "none"])]
    for words, message in (
        (["--views", "solution,solution"], "got 'solution,solution'"),
        (["--views", ""], "names of views"),
        (["--views", "answer", "--checkpoint", str(tmp_path)], "views are scored before training"),
        (["--views", "answer", "data.train.columns.answer=null"], "a final answer for every row"),
        (["--views", "solution", "data.train.columns.reference=null"], "a reference solution for every row"),
        (["--views", "solution", "distillation.target.family=reference_free"], "the view none"),
        (["--views", "solution", "diagnosis.views.source=test"], "diagnosis.views.source"),
        (["--views", "solution", "diagnosis.views.source=validation", "data.validation.path=''"], "data.validation"),
    ):
        assert cli.main(["diagnose", TINY, *overrides, *words]) == cli.USER_ERROR
        assert message in capsys.readouterr().err, words
    assert len(calls) == 1
