"""The manifest of a checkpoint: size and SHA-256 of every file, and a digest of the manifest itself.

It is written last, so a directory with a manifest is complete, and read first, so damage is reported before anything is
loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import torch.distributed as dist

from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.files.json_files import checksum
from nemo_popsd.files.ownership import MANIFEST as FILE_NAME

FORMAT = 2


class FileRecord(TypedDict):
    """Size and digest of one file."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """Content of a manifest, without its digest."""

    format: int
    step: int
    weights: str
    """``whole`` or ``adapters``."""
    base: dict[str, str] | None
    """For adapters: the source of the base model and its digest."""
    layout: dict[str, int]
    """Ranks by axis of parallelism."""
    versions: dict[str, str | None]
    """Version by library."""
    data: NotRequired[str]
    """Digest of the training rows."""
    files: dict[str, FileRecord]
    """Record of each file by relative name."""


class DamagedCheckpointError(UserError):
    """A checkpoint that is incomplete or was changed; another one of the same run may be intact."""

    def __reduce__(self) -> tuple[Callable[[], DamagedCheckpointError], tuple[()]]:
        """Pickles the error, as `UserError` does."""
        rebuild = partial(
            DamagedCheckpointError, self.what, got=str(self.got), need=self.need, fix=self.fix, advice=self.advice
        )
        return rebuild, ()


def file_digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def file_digests(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of the files `names` below `directory`."""
    return {name: file_digest(directory / name) for name in names}


def list_files(directory: Path) -> list[str]:
    """Relative names of the files below `directory`, without the manifest."""
    files_below = (Path(folder) / name for folder, _, files in os.walk(directory) for name in files)
    return sorted(name for path in files_below if (name := path.relative_to(directory).as_posix()) != FILE_NAME)


def write_manifest(directory: Path, facts: Mapping[str, object], files: Mapping[str, tuple[int, str]]) -> None:
    """Writes the manifest. Every other file must have been flushed to the disk.

    Args:
        directory: the checkpoint.
        facts: further content; `format`, `files` and `sum` are added.
        files: size in bytes and SHA-256 of every file.
    """
    content = {
        "format": FORMAT,
        **facts,
        "files": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in sorted(files.items())},
    }
    write_text(directory / FILE_NAME, json.dumps({**content, "sum": checksum(content)}, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest and compares it with its own digest.

    Raises:
        DamagedCheckpointError: the manifest is missing, has another format, or was changed.
    """
    path = directory / FILE_NAME
    if os.path.lexists(path) and not path.is_file():  # reading a named pipe would block
        raise damaged(directory, f"a {FILE_NAME} that is not a regular file")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise damaged(directory, f"format {content['format']} in {FILE_NAME}")
        if content.pop("sum") != checksum(content):
            raise damaged(directory, f"a {FILE_NAME} that was changed after it was written")
    except FileNotFoundError:
        raise damaged(directory, f"no {FILE_NAME}: the checkpoint is incomplete or has another format") from None
    except OSError as error:
        raise damaged(directory, f"{FILE_NAME} that cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(directory, f"an unreadable {FILE_NAME} ({error!r})") from None
    manifest: Manifest = content
    return manifest


def refuse_absent(directory: Path, names: Iterable[str]) -> None:
    """Refuses a checkpoint in which files of `names` are missing. Reads no file.

    Raises:
        DamagedCheckpointError: names the files.
    """
    _raise_damage(directory, [_absent(directory / name, name) for name in sorted(names)])


def verify_files(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compares the files `names` with the manifest. Runs on this process only.

    Raises:
        DamagedCheckpointError: names the files that are missing, truncated or changed.
    """
    files = manifest["files"]
    _raise_damage(directory, [_damage(directory, name, files[name]) for name in sorted(names)])


def verify(directory: Path, manifest: Manifest) -> None:
    """Compares every file with the manifest. Collective if there is a process group: each rank reads a share of the
    files, and one gather of objects collects the results.

    Raises:
        DamagedCheckpointError: on every rank; names the files that are missing, truncated, changed or unexpected.
    """
    files = manifest["files"]
    distributed = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    damage = [_damage(directory, name, files[name]) for name in sorted(files)[rank::ranks]]
    if rank == 0:
        damage += [f"{name} is not in its manifest" for name in list_files(directory) if name not in files]
    gathered: list[list[str | None]] = [damage]
    if distributed:
        gathered = [[]] * ranks
        dist.all_gather_object(gathered, damage)
    _raise_damage(directory, [report for reports in gathered for report in reports])


def _raise_damage(directory: Path, reports: Iterable[str | None]) -> None:
    if damage := sorted(report for report in reports if report):
        more = f" and {len(damage) - 4} more" if len(damage) > 4 else ""
        raise damaged(directory, "; ".join(damage[:4]) + more)


def damaged(directory: Path, got: str) -> DamagedCheckpointError:
    """The error for a checkpoint that cannot be used."""
    return DamagedCheckpointError(
        f"checkpoint {directory}",
        got=got,
        need="an unchanged NeMo checkpoint that nemo_popsd wrote",
        fix="copy it again, or use another checkpoint",
    )


def _damage(directory: Path, name: str, recorded: FileRecord) -> str | None:
    path = directory / name
    if absent := _absent(path, name):
        return absent
    if (size := path.stat().st_size) != recorded["bytes"]:
        return f"{name} has {size} bytes instead of {recorded['bytes']}"
    try:
        changed = file_digest(path)[1] != recorded["sha256"]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return f"{name} was changed (its SHA-256 differs)" if changed else None


def _absent(path: Path, name: str) -> str | None:
    if path.is_file():
        return None
    return f"{name} is " + ("not a regular file" if os.path.lexists(path) else "missing")
