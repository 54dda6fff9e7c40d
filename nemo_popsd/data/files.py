"""The files of a source: a single file, the matches of a pattern or the content of a directory.

Only regular files are opened: reading a named pipe or /dev/zero would not end.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.errors import UserError

EMBEDDED = "nemo_popsd:"
NEED = (
    "a JSONL or Parquet file, a pattern such as 'data/train-*.parquet', a directory with such files, or one that "
    "`datasets` saved"
)
_SUFFIXES = (".parquet", ".jsonl", ".arrow")
_SAVED = ("state.json", "dataset_dict.json")
_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})$")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_SHOWN = 8


def resolve_path(path: str, *, setting: str) -> Path:
    """Return the file or directory that `path` names; ``nemo_popsd:NAME`` is an embedded data set.

    Raises:
        UserError: `path` is empty, does not exist, or is neither a regular file nor a directory.
    """
    if not path:
        raise UserError("data", got=f"{setting}.path=''", need="a file or a directory", fix=f"set {setting}.path")
    if path.startswith(EMBEDDED):
        from nemo_popsd.embedded.names import asset

        return Path(asset(path))
    resolved = Path(path).expanduser()
    try:
        mode = resolved.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            "data",
            got=f"{setting}.path={path!r}, which does not exist (looked in {Path.cwd()}; {reason})",
            need=NEED,
            fix=f"set {setting}.path",
        ) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(
            "data",
            got=f"{setting}.path={path!r}, which is neither a regular file nor a directory",
            need=NEED,
            fix=f"set {setting}.path to a regular file with the rows",
        )
    return resolved


def source_files(paths: Sequence[str], *, setting: str) -> list[Path]:
    """Return the files with the rows of a source, in reading order; a directory that `datasets` saved counts as one.

    Args:
        paths: each a file, a pattern with ``*``, ``?`` or ``[...]``, or a directory.
        setting: dotted name of the source in the configuration, for messages.

    Raises:
        UserError: a path or a shard is missing, is not a regular file or is named twice, or a directory contains data
            files of several splits or formats.
    """
    files = [file for path in paths for file in _files(path, setting)]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError("data", got=f"{str(file)!r} twice", need="each file once", fix=f"set {setting}.path")
        seen.add(file.resolve())
    return files


def row_names(files: Sequence[Path]) -> list[str]:
    """Return the name of each file for row ids: the name of a single file, or paths below the common directory."""
    if len(files) == 1:
        return [files[0].name]
    shared = os.path.commonpath([file.absolute().parent for file in files])
    return [file.absolute().relative_to(shared).as_posix() for file in files]


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a directory that `datasets` saved."""
    return any((path / name).is_file() for name in _SAVED)


def _files(path: str, setting: str) -> list[Path]:
    exists = os.path.lexists(os.path.expanduser(path))
    if glob.has_magic(path) and not exists and not path.startswith(EMBEDDED):
        return _of_pattern(path, setting)
    resolved = resolve_path(path, setting=setting)
    if not resolved.is_dir() or is_saved_dataset(resolved):
        return [resolved]
    return _of_directory(resolved, setting)


def _of_pattern(path: str, setting: str) -> list[Path]:
    matches = sorted(glob.glob(os.path.expanduser(path)))
    if not matches:
        raise UserError(
            "data",
            got=f"{setting}.path={path!r}, which matches no file (looked in {Path.cwd()})",
            need=NEED,
            fix=f"set {setting}.path",
        )
    files = [resolve_path(name, setting=setting) for name in matches]
    for file in files:
        if file.is_dir():
            raise UserError(
                "data",
                got=f"{setting}.path={path!r}, which matches the directory {str(file)!r}",
                need="a pattern that matches files only",
                fix=f"set {setting}.path",
            )
    _refuse_missing_shards(files, setting)
    return files


def _of_directory(directory: Path, setting: str) -> list[Path]:
    """Return the data files in a directory, or in its subdirectory `data` as on the Hub."""
    files: list[Path] = []
    for folder in (directory, directory / "data"):
        if folder.is_dir():
            files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES and not f.name.startswith("."))
        if files:
            break
    if not files:
        present = sorted(file.name for file in directory.iterdir())
        raise _refused(
            directory,
            f"no data file, only {_listed(present)}" if present else "an empty directory",
            "files named *.parquet or *.jsonl in it or in its `data`, or the files that `datasets` saves",
            f"set {setting}.path to the files, or to the directory that holds them",
        )
    files = [resolve_path(str(file), setting=setting) for file in files]
    suffixes = {file.suffix for file in files}
    splits = {match[1].lower() for file in files if (match := _SPLIT.match(file.name))}
    if len(suffixes) > 1 or len(splits) > 1:
        mixed = " and ".join(sorted(splits if len(splits) > 1 else suffixes))
        raise _refused(
            directory,
            f"{mixed} files ({_listed([f.name for f in files])})",
            "the files of one split in one format",
            f"set {setting}.path to a pattern, such as {str(files[0].parent / (min(splits or {''}) + '*'))!r}",
        )
    _refuse_missing_shards(files, setting)
    return files


def _refuse_missing_shards(files: Sequence[Path], setting: str) -> None:
    shards: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD.fullmatch(file.stem):
            shards[file.parent, match["split"], int(match["count"])].add(int(match["index"]))
    for (folder, split, count), present in shards.items():
        missing = sorted(set(range(min(count, len(present) + _SHOWN))) - present)
        if missing and len(present) < count:
            raise _refused(
                folder,
                f"{len(present)} of {count} shards of {split}; shard {missing[0]} is missing",
                "all of them",
                f"fetch the missing files, or set {setting}.path to the files by name",
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _refused(path: Path, got: str, need: str, fix: str) -> UserError:
    return UserError(str(path), got=got, need=need, fix=fix)
