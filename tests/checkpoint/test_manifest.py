"""Damage is named before anything is loaded."""

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


def test_a_whole_checkpoint_passes(checkpoint: Path) -> None:
    read = manifest.read_manifest(checkpoint)
    assert read["step"] == 7
    assert sorted(read["files"]) == ["model_config.yaml", "weights/__0_0.distcp"]
    manifest.verify(checkpoint, read)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_flip, r"weights/__0_0\.distcp was changed"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            r"weights/__0_0\.distcp has 12799 bytes instead of 12800",
        ),
        (lambda file: file.unlink(), r"weights/__0_0\.distcp is missing"),
        (lambda file: file.with_name("more").write_text(""), r"weights/more is not in its manifest"),
    ],
    ids=["flipped byte", "truncated", "missing", "unknown"],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], told: str) -> None:
    damage(checkpoint / "weights" / "__0_0.distcp")
    with pytest.raises(UserError, match=told):
        manifest.verify(checkpoint, manifest.read_manifest(checkpoint))


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to nothing"])
@pytest.mark.parametrize("name", [manifest.FILE_NAME, "model_config.yaml", "weights/__0_0.distcp"])
def test_what_is_no_file_is_named_and_not_waited_for(checkpoint: Path, name: str, kind: str) -> None:
    file = checkpoint / name
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/nowhere")
    with pytest.raises(manifest.DamagedCheckpointError, match=rf"{file.name}.* no regular file"):
        manifest.verify(checkpoint, manifest.read_manifest(checkpoint))


def test_the_error_reaches_other_processes_as_it_is() -> None:
    error = pickle.loads(pickle.dumps(manifest.damaged(Path("here"), "a hole")))
    assert isinstance(error, manifest.DamagedCheckpointError)
    assert str(error) == str(manifest.damaged(Path("here"), "a hole"))


def test_a_manifest_that_was_changed_is_refused(checkpoint: Path) -> None:
    file = checkpoint / manifest.FILE_NAME
    file.write_text(file.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(UserError, match="changed after it was written"):
        manifest.read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "incomplete or of another kind"), ("{", "unreadable"), (json.dumps({"format": 1, "step": 3}), "format 1")],
)
def test_no_manifest_of_ours(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=told):
        manifest.read_manifest(tmp_path)
