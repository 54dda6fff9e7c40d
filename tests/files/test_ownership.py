"""Only directories with a mark of the right kind, in which nothing was added or changed, may be replaced."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from nemo_popsd.checkpoint.manifest import file_digests, list_files, write_manifest
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import (
    ADAPTER,
    CHECKPOINT,
    EXPORT,
    MARK,
    foreign_reason,
    read_mark,
    refuse_foreign_archive,
    refuse_overlap,
    write_mark,
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    with new_directory(tmp_path / "model", EXPORT) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "deeper").mkdir()
        (partial / "deeper" / "file").write_text("1")
    return tmp_path / "model"


def test_an_export_with_an_added_or_edited_file_is_foreign(export: Path) -> None:
    assert foreign_reason(export, EXPORT) is None
    assert foreign_reason(export, ADAPTER) == "a Hugging Face export"
    (export / "deeper" / "README.md").write_text("a model card")
    assert foreign_reason(export, EXPORT) == "deeper/README.md, which nemo_popsd did not write"
    (export / "deeper" / "README.md").unlink()
    (export / "link").symlink_to(export)
    assert foreign_reason(export, EXPORT) == "link, which nemo_popsd did not write"
    (export / "link").unlink()
    (export / "config.json").write_text('{"edited": true}')
    assert foreign_reason(export, EXPORT) == "config.json, which was changed after nemo_popsd wrote it"


def test_links_files_and_invalid_marks_are_foreign(export: Path) -> None:
    (export.parent / "link").symlink_to(export)
    assert foreign_reason(export.parent / "link", EXPORT) == f"a symbolic link to {export}"
    assert foreign_reason(export / "config.json", EXPORT) == "not a directory"
    for text in ("", "{", "[]", '{"kind": "Hugging Face export"}', '{"written_by": "nemo_popsd", "kind": 3}'):
        (export / MARK).write_text(text)
        assert read_mark(export) is None
        assert foreign_reason(export, EXPORT) == f"a directory without the mark {MARK} of nemo_popsd"


def test_missing_and_empty_directories_are_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert foreign_reason(tmp_path / "empty", EXPORT) is None
    assert foreign_reason(tmp_path / "nothing", EXPORT) is None
    (tmp_path / "empty" / MARK).write_text("")  # as a full disk leaves it
    assert foreign_reason(tmp_path / "empty", EXPORT) is None


def test_a_checkpoint_without_a_mark_is_recognised_by_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    assert foreign_reason(tmp_path, CHECKPOINT) is not None
    write_manifest(tmp_path, {"step": 1}, file_digests(tmp_path, list_files(tmp_path)))
    assert foreign_reason(tmp_path, CHECKPOINT) is None
    (tmp_path / "weights").write_text("damaged")
    assert foreign_reason(tmp_path, CHECKPOINT) is None
    (tmp_path / "notes.txt").write_text("mine")
    assert foreign_reason(tmp_path, CHECKPOINT) == "notes.txt, which nemo_popsd did not write"
    write_mark(tmp_path, CHECKPOINT)
    assert foreign_reason(tmp_path, CHECKPOINT) == "notes.txt, which nemo_popsd did not write"


def test_an_archive_replaces_only_a_packed_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    refuse_foreign_archive(path)
    path.write_text("three weeks")
    with pytest.raises(UserError, match="a file that is not a packed checkpoint"):
        refuse_foreign_archive(path)
    (tmp_path / "manifest.json").write_text("{}")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "manifest.json", arcname="./manifest.json")
    refuse_foreign_archive(path)
    (tmp_path / "link.nemo").symlink_to(path)
    with pytest.raises(UserError, match="something other than a regular file"):
        refuse_foreign_archive(tmp_path / "link.nemo")


@pytest.mark.parametrize(("written", "relation"), [("base", "is"), ("base/x", "lies inside"), (".", "contains")])
def test_a_directory_that_is_read_is_not_overwritten(tmp_path: Path, written: str, relation: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / written, tmp_path / "link" / written):
        with pytest.raises(UserError, match=f"{relation} the base model"):
            refuse_overlap(path, {"the base model": tmp_path / "base"}, setting="OUTPUT")
    refuse_overlap(tmp_path / "based", {"the base model": tmp_path / "base"}, setting="OUTPUT")
