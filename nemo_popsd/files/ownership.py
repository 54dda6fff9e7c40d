"""Marks directories that this package wrote, and may therefore replace or remove. Nothing else is ever removed.

A file `.nemo_popsd`, the mark, is written first into every directory that the package makes. In an export it lists the
files with their sizes; a checkpoint has its manifest for that. A directory without a mark, or with files that are not
on its list, is foreign, whatever its name.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.errors import UserError

MARK = ".nemo_popsd"
"""Name of the file that marks a directory as written by this package."""
MANIFEST = "manifest.json"
"""Name of the file that lists the content of a checkpoint."""
EXPORT, ADAPTER, CHECKPOINT = "Hugging Face export", "PEFT adapter", "checkpoint"
RUN, DIAGNOSIS, EVALUATION = "training run", "diagnosis", "evaluation"
"""The kinds of directory that a mark names."""
_FORMAT = 1
_MEMBERS = 64


@dataclass(frozen=True)
class Mark:
    """The content of a mark."""

    kind: str
    """One of the kinds above."""
    files: Mapping[str, int] | None
    """Size in bytes of each file by its relative name; None while the directory is being written, and for a checkpoint,
    whose manifest lists the files."""


def write_mark(directory: Path, kind: str, files: Mapping[str, int] | None = None) -> None:
    """Marks `directory` as written by this package; the mark is on the disk when this returns.

    Args:
        directory: must exist.
        kind: see `Mark`.
        files: see `Mark`.
    """
    content = {"written_by": "nemo_popsd", "format": _FORMAT, "kind": kind, "files": files and dict(files)}
    with (directory / MARK).open("w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_mark(directory: Path) -> Mark | None:
    """The mark of `directory`; None if there is no valid one."""
    content = _read_json(directory / MARK)
    kind = content.get("kind")
    if content.get("written_by") != "nemo_popsd" or not isinstance(kind, str):
        return None
    files = content.get("files")
    return Mark(kind, files if isinstance(files, dict) else None)


def sizes_of(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below `directory` by its relative name, without the mark. Links are not followed."""
    sizes = {}
    for folder, subfolders, names in os.walk(directory):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in (*names, *links):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if relative != MARK:
                sizes[relative] = path.lstat().st_size
    return sizes


def foreign_reason(path: Path, kind: str) -> str | None:
    """Why `path` is not a directory of `kind` that this package wrote, or holds anything else.

    Returns:
        The reason, as the message shows it; None if this package wrote all of it, and if `path` is absent or a
        directory without files, where nothing can be lost.
    """
    if path.is_symlink():
        return f"a symbolic link to {os.readlink(path)}"
    if not path.exists():
        return None
    if not path.is_dir():
        return "not a directory"
    present = sizes_of(path)
    written: Mapping[str, int] | None
    mark = read_mark(path)
    if mark is None:
        written = _listed_by_manifest(path) if kind == CHECKPOINT else None
        if written is None:
            return f"a directory without the mark {MARK} of nemo_popsd" if present else None
    elif mark.kind != kind:
        return f"a {mark.kind}"
    else:
        written = mark.files if mark.files is not None or kind != CHECKPOINT else _listed_by_manifest(path)
    if written is None:  # partially written
        return None
    for name, size in sorted(present.items()):
        if name not in written:
            return f"{name}, which nemo_popsd did not write"
        if written[name] != size and kind != CHECKPOINT:  # in a checkpoint, another size means damage, not an edit
            return f"{name}, which was changed after nemo_popsd wrote it"
    return None


def refuse_foreign(path: Path, kind: str, *, setting: str = "output") -> None:
    """Refuses to replace or remove anything that this package did not write.

    Args:
        path: path to be replaced.
        kind: kind of directory that `path` must be.
        setting: setting that contains `path`, for the message.

    Raises:
        UserError: something else is there.
    """
    if reason := foreign_reason(path, kind):
        raise UserError(
            f"{kind} {path}",
            got=f"{reason}, where the {kind} would be written",
            need=f"a path that does not exist, or an unchanged {kind} of nemo_popsd",
            fix=f"set {setting} to another directory, or move {path} away; nothing was removed",
        )


def refuse_foreign_archive(path: Path, *, setting: str = "output") -> None:
    """Refuses to replace a file that is not a packed checkpoint of this package.

    Args:
        path: path to be replaced.
        setting: setting that contains `path`, for the message.

    Raises:
        UserError: something else is there.
    """
    reason = None
    if path.is_symlink() or (path.exists() and not path.is_file()):
        reason = "something other than a regular file"
    elif path.exists() and not _is_archive(path):
        reason = "a file that is not a packed checkpoint of nemo_popsd"
    if reason:
        raise UserError(
            f"archive {path}",
            got=f"{reason}, where the archive would be written",
            need="a path that does not exist, or an archive of nemo_popsd",
            fix=f"set {setting} to another file, or move {path} away; nothing was removed",
        )


def refuse_overlap(path: Path, keep: Mapping[str, str | Path], *, setting: str) -> None:
    """Refuses to write into or over directories that are read. Symbolic links are resolved.

    Args:
        path: path to be written.
        keep: paths that must not change, by their description.
        setting: setting that contains `path`, for the message.

    Raises:
        UserError: `path` equals, lies inside, or contains one of them.
    """
    written = Path(os.path.realpath(path))
    for what, place in keep.items():
        kept = Path(os.path.realpath(place))
        if written == kept:
            relation = "is"
        elif written.is_relative_to(kept):
            relation = "lies inside"
        elif kept.is_relative_to(written):
            relation = "contains"
        else:
            continue
        raise UserError(
            setting,
            got=f"{setting}={str(path)!r}, which {relation} {what} {str(place)!r}",
            need="a separate directory: what is read is never overwritten",
            fix=f"set {setting} to another directory; nothing was removed",
        )


def _is_archive(path: Path) -> bool:
    """Whether `path` is a packed checkpoint, which has the mark or the manifest among its first members."""
    try:
        with tarfile.open(path) as tar:
            return any(
                member.name in (f"./{MARK}", f"./{MANIFEST}") for member, _ in zip(tar, range(_MEMBERS), strict=False)
            )
    except (OSError, EOFError, tarfile.TarError):
        return False


def _listed_by_manifest(directory: Path) -> dict[str, int] | None:
    """Sizes in bytes of the files that a checkpoint's manifest lists; None if there is no valid manifest."""
    content = _read_json(directory / MANIFEST)
    files = content.get("files")
    if "format" not in content or "sum" not in content or not isinstance(files, dict):
        return None
    try:
        return {name: int(entry["bytes"]) for name, entry in files.items()} | {MANIFEST: 0}
    except (KeyError, TypeError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, object]:
    """The JSON object in a regular file; empty for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
