"""Files and directories that are complete or absent, whatever kills the process or the machine in between.

The order is always: write under another name, flush file and directory to the disk, rename, flush the directory that
holds the name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of what is still being written."""
REPLACED = ".replaced"
"""Suffix of what a new directory has taken the place of, for the moment that takes."""


def write_text(path: Path, text: str) -> None:
    """Writes a file that holds the old or the new text at any moment, never half of one."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_tree(directory: Path) -> None:
    """Waits until every file and directory below `directory`, itself included, is on the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            flush_file(Path(folder) / name)
        flush_directory(Path(folder))


def flush_file(path: Path) -> None:
    """Waits until the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(directory: Path) -> None:
    """Waits until the names in `directory` are on the disk."""
    flush_file(directory)


def put_in_place(new: Path, path: Path) -> None:
    """Renames `new`, a file or directory that is on the disk already, to `path`.

    A directory that stood there is renamed aside first and removed last: one of the two is complete at any moment,
    and `recover` finds it.
    """
    if path.is_dir():
        replaced = path.with_name(path.name + REPLACED)
        remove(replaced)
        path.rename(replaced)
        new.rename(path)
        flush_directory(path.parent)
        remove(replaced)
    else:
        new.replace(path)
        flush_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory that is `path` once the block has ended, with all that was put into it; what stood
    there is replaced then, and not before. If the block raises, it is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
    except BaseException:
        remove(partial)
        raise
    put_in_place(partial, path)


def recover(folder: Path) -> None:
    """Cleans `folder` after a kill: half-written things go, a directory that was set aside comes back if nothing took
    its place.
    """
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith(PARTIAL):
            remove(entry)
        elif entry.name.endswith(REPLACED):
            original = entry.with_name(entry.name.removesuffix(REPLACED))
            if original.exists():
                remove(entry)
            else:
                entry.rename(original)


def remove(path: Path) -> None:
    """Removes a file, a directory or nothing. A directory loses its manifest first: what is left when a kill comes in
    between is incomplete and looks it.
    """
    if path.is_dir() and not path.is_symlink():
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
