"""Complete or absent: every order in which a kill can leave things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_popsd import atomic


def _directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(content)
    (path / "data").write_text(content)
    return path


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a", "1")
    atomic.write_text(tmp_path / "a", "2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "2")]


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic.write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    _directory(tmp_path / "run", "old")
    atomic.put_in_place(_directory(tmp_path / "run.partial", "new"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "data").read_text() == "new"


@pytest.mark.parametrize("after", ["aside", "renamed"])
def test_recovery_from_a_kill_while_a_directory_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Killed with the old one aside, or with the new one in its place and the old one not yet removed."""
    _directory(tmp_path / "run", "old")
    new = _directory(tmp_path / "run.partial", "new")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    if after == "aside":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: kill() if self == new else rename(self, to))
    else:
        monkeypatch.setattr(atomic, "flush_directory", kill)
    with pytest.raises(KeyboardInterrupt):
        atomic.put_in_place(new, tmp_path / "run")
    monkeypatch.undo()
    atomic.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "data").read_text() == ("old" if after == "aside" else "new")


def test_recovery_removes_what_is_half_written(tmp_path: Path) -> None:
    _directory(tmp_path / "step-000002.partial", "half")
    (tmp_path / "run.nemo.tar.partial").write_text("half")
    _directory(tmp_path / "step-000001", "whole")
    atomic.recover(tmp_path)
    atomic.recover(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_is_removed_half_looks_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _directory(tmp_path / "run", "old")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        atomic.remove(directory)
    assert [path.name for path in directory.iterdir()] == ["data"]


def test_a_new_directory_has_its_name_once_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "deeper" / "model"
    for content in ("old", "new"):
        with atomic.new_directory(place) as directory:
            (directory / "file").write_text(content)
            assert not place.exists() or (place / "file").read_text() == "old"
        assert [(path.name, (path / "file").read_text()) for path in place.parent.iterdir()] == [("model", content)]
    with pytest.raises(FileExistsError), atomic.new_directory(place) as directory:
        _directory(directory, "half")  # it exists
    assert [(path.name, (path / "file").read_text()) for path in place.parent.iterdir()] == [("model", "new")]
