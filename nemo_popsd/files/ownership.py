"""What of the things on the disk this package wrote, and may therefore replace or remove. Nothing else is ever removed.

A directory of ours says so by a file `.nemo_popsd` that was written first when the directory was made. Of an export it
lists the files with their sizes; a checkpoint has its manifest for that. What holds anything beside that list, or has
no mark, is not ours, whatever its name is.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_popsd.errors import UserError

MARK = ".nemo_popsd"
"""File that makes a directory ours."""
MANIFEST = "manifest.json"
"""File that lists what a checkpoint holds."""
EXPORT, ADAPTER, CHECKPOINT = "Hugging Face export", "PEFT adapter", "checkpoint"
RUN, DIAGNOSIS, EVALUATION = "training run", "diagnosis", "evaluation"
"""What a mark says that a directory is."""
_FORMAT = 1
_MEMBERS = 64


@dataclass(frozen=True)
class Mark:
    """What a mark says."""

    kind: str
    """One of the kinds above."""
    files: Mapping[str, int] | None
    """Size of each file by its relative name; None while the directory is written, and where a manifest lists them."""


def write_mark(directory: Path, kind: str, files: Mapping[str, int] | None = None) -> None:
    """Marks `directory` as ours; the mark is on the disk when this returns.

    Args:
        directory: must exist.
        kind: what it is.
        files: see `Mark`.
    """
    content = {"written_by": "nemo_popsd", "format": _FORMAT, "kind": kind, "files": files and dict(files)}
    with (directory / MARK).open("w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_mark(directory: Path) -> Mark | None:
    """The mark of `directory`; None where there is none that this package wrote."""
    content = _read_json(directory / MARK)
    if content.get("written_by") != "nemo_popsd" or not isinstance(content.get("kind"), str):
        return None
    files = content.get("files")
    return Mark(content["kind"], files if isinstance(files, dict) else None)


def sizes_of(directory: Path) -> dict[str, int]:
    """Size of every file below `directory` by its relative name, the mark left out. Links count as themselves."""
    found = {}
    for folder, subfolders, names in os.walk(directory):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in (*names, *links):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if relative != MARK:
                found[relative] = path.lstat().st_size
    return found


def foreign_reason(path: Path, kind: str) -> str | None:
    """Why `path` is not, or not only, what this package wrote as `kind`.

    Returns:
        None if it is ours alone, and for nothing or a directory without a file, where nothing can be lost.
    """
    if path.is_symlink():
        return f"a symbolic link to {os.readlink(path)}"
    if not path.exists():
        return None
    if not path.is_dir():
        return "no directory"
    present = sizes_of(path)
    written: Mapping[str, int] | None
    mark = read_mark(path)
    if mark is None:
        written = _listed_by_manifest(path) if kind == CHECKPOINT else None
        if written is None:
            return f"no {MARK} that says that nemo_popsd wrote it" if present else None
    elif mark.kind != kind:
        return f"a {mark.kind}"
    else:
        written = mark.files if mark.files is not None or kind != CHECKPOINT else _listed_by_manifest(path)
    if written is None:  # half written
        return None
    for name, size in sorted(present.items()):
        if name not in written:
            return f"{name}, which nemo_popsd did not write"
        if written[name] != size and kind != CHECKPOINT:  # in a checkpoint that is damage, not an edit
            return f"{name}, which was changed after nemo_popsd wrote it"
    return None


def refuse_foreign(path: Path, kind: str, *, setting: str = "output") -> None:
    """Refuses to replace or remove what is not ours.

    Args:
        path: what would be replaced.
        kind: what it would have to be.
        setting: name of it for the message.

    Raises:
        UserError: something else is there.
    """
    if reason := foreign_reason(path, kind):
        raise UserError(
            f"{kind} {path}",
            got=f"{reason}, where the {kind} would be written",
            need=f"a path where nothing is yet, or an earlier {kind} of nemo_popsd, unchanged",
            fix=f"set {setting} to another directory, or move {path} away; nothing was removed",
        )


def refuse_foreign_archive(path: Path, *, setting: str = "output") -> None:
    """Refuses to replace a file that is no packed checkpoint of ours.

    Args:
        path: what would be replaced.
        setting: name of it for the message.

    Raises:
        UserError: something else is there.
    """
    reason = None
    if path.is_symlink() or (path.exists() and not path.is_file()):
        reason = "no regular file"
    elif path.exists() and not _is_archive(path):
        reason = "a file that is no packed checkpoint of nemo_popsd"
    if reason:
        raise UserError(
            f"archive {path}",
            got=f"{reason}, where the archive would be written",
            need="a path where nothing is yet, or an earlier archive of nemo_popsd",
            fix=f"set {setting} to another file, or move {path} away; nothing was removed",
        )


def refuse_overlap(path: Path, keep: Mapping[str, str | Path], *, setting: str) -> None:
    """Refuses to write into, or over, what must stay. Symbolic links are resolved.

    Args:
        path: where something is to be written.
        keep: what must stay, by what it is.
        setting: name of `path` for the message.

    Raises:
        UserError: one is the other, or lies inside it.
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
            need="a directory of its own: what is read is never written over",
            fix=f"give another {setting}; nothing was removed",
        )


def _is_archive(path: Path) -> bool:
    """Whether a packed checkpoint: mark or manifest are among its first members."""
    try:
        with tarfile.open(path) as tar:
            return any(
                member.name in (f"./{MARK}", f"./{MANIFEST}") for member, _ in zip(tar, range(_MEMBERS), strict=False)
            )
    except (OSError, EOFError, tarfile.TarError):
        return False


def _listed_by_manifest(directory: Path) -> dict[str, int] | None:
    """Sizes of the files that a checkpoint's manifest lists; None where there is no manifest of ours."""
    content = _read_json(directory / MANIFEST)
    files = content.get("files")
    if "format" not in content or "sum" not in content or not isinstance(files, dict):
        return None
    try:
        return {name: int(entry["bytes"]) for name, entry in files.items()} | {MANIFEST: 0}
    except (KeyError, TypeError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a regular file that is a JSON object; empty for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
