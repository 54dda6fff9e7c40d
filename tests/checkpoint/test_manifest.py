"""Damage to a checkpoint is reported before anything is loaded."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_popsd.checkpoint import manifest
from nemo_popsd.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__0_0.distcp").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "model_config.yaml").write_text("a: 1\n")
    manifest.write_manifest(tmp_path, {"step": 7}, manifest.file_digests(tmp_path, manifest.list_files(tmp_path)))
    return tmp_path


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def test_an_intact_checkpoint_is_accepted(checkpoint: Path) -> None:
    read = manifest.read_manifest(checkpoint)
    assert read["step"] == 7
    assert sorted(read["files"]) == ["model_config.yaml", "weights/__0_0.distcp"]
    manifest.verify(checkpoint, read)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, r"weights/__0_0\.distcp was changed"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            r"weights/__0_0\.distcp has 12799 bytes instead of 12800",
        ),
        (lambda file: file.unlink(), r"weights/__0_0\.distcp is missing"),
        (lambda file: file.with_name("more").write_text(""), r"weights/more is not in its manifest"),
    ],
    ids=["flipped byte", "truncated", "missing", "unexpected"],
)
def test_the_damaged_file_is_named(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint / "weights" / "__0_0.distcp")
    with pytest.raises(UserError, match=message):
        manifest.verify(checkpoint, manifest.read_manifest(checkpoint))


@pytest.mark.parametrize("entry", ["directory", "pipe", "link to nothing"])
@pytest.mark.parametrize("name", [manifest.FILE_NAME, "model_config.yaml", "weights/__0_0.distcp"])
def test_an_entry_that_is_not_a_regular_file_is_refused_without_blocking(
    checkpoint: Path, name: str, entry: str
) -> None:
    file = checkpoint / name
    file.unlink()
    if entry == "directory":
        file.mkdir()
    elif entry == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/nowhere")
    with pytest.raises(manifest.DamagedCheckpointError, match=rf"{file.name}.* not a regular file"):
        manifest.verify(checkpoint, manifest.read_manifest(checkpoint))


def test_the_error_is_pickled_without_loss() -> None:
    error = pickle.loads(pickle.dumps(manifest.damaged(Path("here"), "damage")))
    assert isinstance(error, manifest.DamagedCheckpointError)
    assert str(error) == str(manifest.damaged(Path("here"), "damage"))


def test_a_manifest_that_was_changed_is_refused(checkpoint: Path) -> None:
    file = checkpoint / manifest.FILE_NAME
    file.write_text(file.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(UserError, match="changed after it was written"):
        manifest.read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "incomplete or has another format"),
        ("{", "unreadable"),
        (json.dumps({"format": 1, "step": 3}), "format 1"),
    ],
)
def test_a_missing_unreadable_or_older_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read_manifest(tmp_path)
