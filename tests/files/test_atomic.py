"""Directories are complete or absent after a kill at any moment, and foreign files and directories stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.files import atomic
from nemo_popsd.files.ownership import CHECKPOINT, EXPORT, MARK, read_mark, write_mark


def _directory(path: Path, content: str) -> Path:
    path.mkdir()
    write_mark(path, CHECKPOINT)
    (path / "data").write_text(content)
    return path


def _is_name(name: str) -> bool:
    return name in ("run", "step-000001", "step-000002")


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("foreign")
    atomic.write_text(tmp_path / "a", "1")
    atomic.write_text(tmp_path / "a", "2")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "2", "a.partial": "foreign"}


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic.write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_partial_files_of_a_killed_write_are_removed_and_similar_names_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deeper").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", _kill)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            atomic.write_text(tmp_path / "deeper" / "metrics.jsonl", "1")
    assert len(list((tmp_path / "deeper").iterdir())) == 1
    (tmp_path / "film.partial").write_text("foreign")
    atomic.remove_partial_files(tmp_path)
    assert not list((tmp_path / "deeper").iterdir())
    assert (tmp_path / "film.partial").exists()


def test_a_directory_replaces_another(tmp_path: Path) -> None:
    _directory(tmp_path / "run", "old")
    atomic.atomic_replace(_directory(tmp_path / "run.partial", "new"), tmp_path / "run", CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "data").read_text() == "new"


def _kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", ["aside", "renamed"])
def test_recovery_from_a_kill_while_a_directory_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The kill comes when the old directory is set aside, or when the new one has its name and the old one remains."""
    _directory(tmp_path / "run", "old")
    new = _directory(tmp_path / "run.partial", "new")
    if after == "aside":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: _kill() if self == new else rename(self, to))
    else:
        monkeypatch.setattr(atomic, "flush_directory", _kill)
    with pytest.raises(KeyboardInterrupt):
        atomic.atomic_replace(new, tmp_path / "run", CHECKPOINT)
    monkeypatch.undo()
    atomic.recover(tmp_path, CHECKPOINT, _is_name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "data").read_text() == ("old" if after == "aside" else "new")


def test_recovery_removes_partially_written_directories_and_nothing_else(tmp_path: Path) -> None:
    _directory(tmp_path / "step-000002.partial", "half")
    (tmp_path / "step-000001.partial").mkdir()
    _directory(tmp_path / "step-000001", "whole")
    (tmp_path / "film.partial").mkdir()
    (tmp_path / "film.partial" / "data").write_text("foreign")
    atomic.recover(tmp_path, CHECKPOINT, _is_name)
    atomic.recover(tmp_path / "nowhere", CHECKPOINT, _is_name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.partial", "step-000001"]


@pytest.mark.parametrize("suffix", ["", ".partial", ".replaced", ".removed"])
def test_a_foreign_directory_is_refused_and_stays(tmp_path: Path, suffix: str) -> None:
    """Under the final name and under each temporary name."""
    other = tmp_path / f"run{suffix}"
    other.mkdir()
    (other / "data").write_text("three weeks")
    new = atomic.new_directory(tmp_path / "run", CHECKPOINT)
    message = rf"run{suffix}: got a directory without the mark \{MARK}.*nothing was removed"
    with pytest.raises(UserError, match=message), new:
        pytest.fail("the block was entered")
    if suffix:
        with pytest.raises(UserError, match="nothing was removed"):
            atomic.recover(tmp_path, CHECKPOINT, _is_name)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert (other / "data").read_text() == "three weeks"


def test_a_directory_that_appears_during_the_write_stays(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        (partial / "file").write_text("new")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "notes.txt").write_text("mine")

    new = atomic.new_directory(tmp_path / "model", EXPORT)
    with pytest.raises(UserError, match=r"model: got a directory without the mark \.nemo_popsd"), new as partial:
        write(partial)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_partially_removed_directory_is_renamed_and_removed_by_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _directory(tmp_path / "run", "old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", _kill)
        with pytest.raises(KeyboardInterrupt):
            atomic.remove_directory(tmp_path / "run", CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["run.removed"]
    atomic.recover(tmp_path, CHECKPOINT, _is_name)
    assert not list(tmp_path.iterdir())


def test_a_new_directory_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "deeper" / "model"
    for content in ("old", "new"):
        with atomic.new_directory(place, EXPORT) as directory:
            (directory / "file").write_text(content)
            assert not place.exists() or (place / "file").read_text() == "old"
        assert [path.name for path in place.parent.iterdir()] == ["model"]
        assert (place / "file").read_text() == content
    mark = read_mark(place)
    assert mark is not None
    assert (mark.kind, mark.files) == (EXPORT, {"file": 3})
    with pytest.raises(FileExistsError), atomic.new_directory(place, EXPORT) as directory:
        _directory(directory, "partial")  # raises, since the directory exists
    assert (place / "file").read_text() == "new"


def test_files_that_match_are_removed_and_others_stay(tmp_path: Path) -> None:
    for name in ("part-0.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    atomic.remove_files(tmp_path, ("part-*.jsonl",))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").rename(tmp_path / "part-1.jsonl")
    atomic.remove_files(tmp_path, ("part-*.jsonl",))
    assert not tmp_path.exists()
    atomic.remove_files(tmp_path, ("part-*.jsonl",))
