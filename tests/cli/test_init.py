"""`popsd init`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.recipes import recipe_names


def test_without_arguments_it_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_it_writes_a_recipe_and_says_which_paths_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    assert cli.main(["init", "qwen3_8b", "mine", "data.train.path=rows.jsonl", "training.steps=3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "configuration: mine/qwen3_8b.yaml",
        f"  student.source=models/Qwen3-8B  (not found in {tmp_path})",
        f"  data.train.path={tmp_path}/rows.jsonl  (found)",
        "next: popsd train mine/qwen3_8b.yaml; `popsd config --describe KEY` explains a setting",
    ]
    assert load_config("mine/qwen3_8b.yaml").training.steps == 3
    assert cli.main(["init", "paper_evaluation"]) == 0
    assert "next: popsd evaluate paper_evaluation.yaml;" in capsys.readouterr().out


def test_it_takes_one_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "tiny", "a", "b"]) == 2
    assert "got a b; need one DIR" in capsys.readouterr().err
    assert cli.main(["init", "tiny", "$HOME/a"]) == 2
    assert "a `$` that is not expanded" in capsys.readouterr().err
