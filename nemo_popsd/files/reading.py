"""Reading of files that other programs made: only regular files of a bounded size are read.

A model directory or a checkpoint may hold a pipe, a device, a git-lfs pointer or a truncated file. Each is reported
before a library opens it, which might block, fill the memory or raise an unclear error.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import decode_json

JSON_BYTES = 64 << 20
"""Largest JSON file that is read; the index of the largest models has some 10 MiB."""
YAML_BYTES = 4 << 20
"""Largest YAML file that is read."""
_YAML_NODES = 1_000_000
_POINTER = b"version https://git-lfs"
_FILE_TYPES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def unreadable(file: Path) -> str | None:
    """Why `file` cannot be read, as a predicate for a message; None for a regular file with content.

    Links are followed. Only a regular file is opened.
    """
    try:
        mode = file.stat()
        if not stat.S_ISREG(mode.st_mode):
            return (
                f"is {next((name for test, name in _FILE_TYPES if test(mode.st_mode)), 'a special file')}, not a file"
            )
        if mode.st_size == 0:
            return "is empty"
        with file.open("rb") as opened:
            prefix = opened.read(len(_POINTER))
    except OSError as error:
        dangling = file.is_symlink() and isinstance(error, FileNotFoundError)
        return "is a dangling link" if dangling else f"cannot be read ({error.strerror})"
    return "is a git-lfs pointer in place of the file (run `git lfs pull`)" if prefix == _POINTER else None


def read_text(file: Path, what: str, *, fix: str, limit: int = JSON_BYTES) -> str:
    """The text of a regular UTF-8 file.

    Args:
        file: to read.
        what: owner of the file, for the message.
        fix: for the message.
        limit: largest size in bytes.

    Raises:
        UserError: it is not a regular file, too large, or not UTF-8.
    """
    reason = unreadable(file)
    if reason is None and (size := file.stat().st_size) > limit:
        reason = f"has {size} bytes, more than {limit}"
    if reason is None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = f"cannot be read ({error})"
    if reason is None and text.startswith("\ufeff"):
        reason = "begins with a byte order mark, which transformers does not read"
    if reason is not None:
        raise UserError(what, got=f"{file.name}, which {reason}", need="a text file", fix=fix)
    return text


def read_strict_json(file: Path, what: str, *, fix: str, kind: type = dict) -> Any:
    """The value in a JSON file of another program, decoded strictly: no object repeats a key, every number is finite.

    Args:
        file: to read.
        what: owner of the file, for the message.
        fix: for the message.
        kind: required type of the value, `dict` or `list`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    text = read_text(file, what, fix=fix)
    try:
        value = decode_json(text, strict=True)
    except ValueError as error:
        reason = str(error)
    else:
        if isinstance(value, kind):
            return value
        reason = f"a JSON {type(value).__name__}"
    need = "a JSON object" if kind is dict else "a JSON list"
    raise UserError(what, got=f"{file.name}: {reason}", need=need, fix=fix)


def check_yaml(text: str) -> None:
    """Refuse YAML whose nested aliases make a small text expand to an enormous value.

    Raises:
        yaml.YAMLError: the text expands too much, is nested too deeply, or is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _expanded(node, {}) > _YAML_NODES:
            raise yaml.YAMLError(f"aliases that expand to more than {_YAML_NODES} values")
    except RecursionError:
        raise yaml.YAMLError("values nested too deeply") from None


def foreign_entry(directory: Path) -> str | None:
    """The first entry that a directory made by another program must not hold, as a phrase; None if there is none.

    Refused are a symbolic link that leads out of the directory, and anything that is neither a file nor a directory.
    `directory` itself may be a link. A snapshot in a Hugging Face cache consists of links into the sibling folder
    ``blobs``; these are allowed.
    """
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            shown = path.relative_to(root).as_posix()
            if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
                return f"{shown!r}, a symbolic link out of the directory"
            if not (path.is_file() or path.is_dir()):
                return f"{shown!r}, which is neither a file nor a directory"
    return None


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values below `node`, where each use of an alias counts; infinite for an alias that contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]
