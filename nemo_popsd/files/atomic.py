"""Writes files and directories that are complete or absent, even if the process or the machine stops during the write.

The order is always: write under another name, flush file and directory to the disk, rename, flush the parent directory.
Directories carry the mark of `nemo_popsd.files.ownership` from their creation; a directory without the mark is never
removed or replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_popsd.files.ownership import MARK, foreign_reason, read_mark, refuse_foreign, sizes_of, write_mark

PARTIAL = ".partial"
"""Suffix of a file or directory that is being written."""
REPLACED = ".replaced"
"""Suffix of the old directory while a new one takes its name."""
REMOVED = ".removed"
"""Suffix of a directory that is being removed."""
_PARTIAL_FILE = re.compile(r".+\.popsd-[0-9a-f]{8}" + re.escape(PARTIAL))


def write_text(path: Path, text: str) -> None:
    """Writes a file that holds the complete old or the complete new text at any moment."""
    write_lines(path, (text,))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Like `write_text`, for text that is generated line by line and never held in memory as a whole.

    Raises:
        OSError: the file cannot be written. After an error in `lines` the old file remains as well.
    """
    partial = path.with_name(f"{path.name}.popsd-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def remove_partial_files(directory: Path) -> None:
    """Removes the partial files that killed calls of `write_text` left anywhere below `directory`."""
    for folder, _, names in os.walk(directory):
        for name in names:
            if _PARTIAL_FILE.fullmatch(name):
                (Path(folder) / name).unlink()


def flush_tree(directory: Path) -> None:
    """Waits until `directory` and every file and directory below it are on the disk."""
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
    """Waits until the entries of `directory` are on the disk."""
    flush_file(directory)


def names_needed(path: Path) -> tuple[Path, ...]:
    """The names that writing `path` needs: its own and the temporary ones."""
    return path, *(path.with_name(path.name + suffix) for suffix in (PARTIAL, REPLACED, REMOVED))


def refuse_occupied(path: Path, kind: str, *, setting: str = "output") -> None:
    """Refuses to write the directory `path` if anything not written by nemo_popsd has one of the names that it needs.

    Raises:
        UserError: names the existing file or directory.
    """
    for name in names_needed(path):
        refuse_foreign(name, kind, setting=setting)


def atomic_replace(new: Path, path: Path, kind: str) -> None:
    """Renames the directory `new`, which is marked and flushed to the disk, to `path`.

    An earlier directory at `path` is renamed aside first and removed last: one of the two is complete at any moment,
    and `recover` finds it.

    Raises:
        UserError: nemo_popsd did not write what is at `path`; nothing has been changed.
    """
    refuse_foreign(path, kind)
    if path.is_dir():
        replaced = path.with_name(path.name + REPLACED)
        remove_directory(replaced, kind)
        path.rename(replaced)
        new.rename(path)
        flush_directory(path.parent)
        remove_directory(replaced, kind)
    else:
        new.rename(path)
        flush_directory(path.parent)


def make_partial(path: Path, kind: str) -> Path:
    """Makes the marked, otherwise empty directory in which `path` is written, and returns it.

    Raises:
        UserError: something that nemo_popsd did not write has its name; nothing has been changed.
    """
    partial = path.with_name(path.name + PARTIAL)
    remove_directory(partial, kind)
    partial.mkdir(parents=True)
    write_mark(partial, kind)
    return partial


@contextmanager
def new_directory(path: Path, kind: str) -> Iterator[Path]:
    """Yields a directory that is renamed to `path` when the block ends, and then replaces an earlier one. If the block
    raises, the new directory is removed.

    Raises:
        UserError: nemo_popsd did not write what is at `path`; nothing has been changed.
    """
    refuse_occupied(path, kind)
    partial = make_partial(path, kind)
    try:
        yield partial
        write_mark(partial, kind, sizes_of(partial))
        flush_tree(partial)
    except BaseException:
        remove_directory(partial, kind)
        raise
    atomic_replace(partial, path, kind)


def recover(folder: Path, kind: str, is_name: Callable[[str], bool]) -> None:
    """Cleans `folder` after a kill: removes partially written and partially removed directories, and renames a
    directory that was set aside back if no new one took its place.

    Args:
        folder: may be absent.
        kind: of the directories in it.
        is_name: whether nemo_popsd gives this name to a directory; any other entry is left alone.

    Raises:
        UserError: something that nemo_popsd did not write has one of its temporary names.
    """
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        original = entry.with_name(entry.stem)
        if entry.suffix not in (PARTIAL, REPLACED, REMOVED) or not is_name(original.name):
            continue
        refuse_foreign(entry, kind)
        if entry.suffix == REPLACED and not original.exists():
            entry.rename(original)
        else:
            remove_directory(entry, kind)


def remove_directory(path: Path, kind: str) -> None:
    """Removes a directory that nemo_popsd wrote, if it exists.

    It is renamed first, so that a directory that a kill leaves partially removed does not look complete. The mark is
    removed last.

    Raises:
        UserError: nemo_popsd did not write it, or not all of it.
    """
    refuse_foreign(path, kind)
    if not path.is_dir():
        return
    if path.suffix not in (PARTIAL, REPLACED, REMOVED):
        removed = path.with_name(path.name + REMOVED)
        remove_directory(removed, kind)
        path = path.rename(removed)
    if read_mark(path) is None:
        with contextlib.suppress(OSError):  # a full disk must not prevent the removal
            write_mark(path, kind)
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    (path / MARK).unlink(missing_ok=True)
    path.rmdir()


def remove_files(directory: Path, patterns: Sequence[str]) -> None:
    """Removes the files of `directory` whose names match, then `directory` itself if it is empty."""
    if not directory.is_dir():
        return
    for entry in sorted(directory.iterdir()):
        if not entry.is_dir() and any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            entry.unlink()
    if not directory.is_symlink() and not any(directory.iterdir()):
        directory.rmdir()


def is_owned(path: Path, kind: str) -> bool:
    """Whether `path` is a directory of `kind` that nemo_popsd wrote and may remove."""
    return path.is_dir() and foreign_reason(path, kind) is None
