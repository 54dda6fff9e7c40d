"""Files that somebody else made, read only when they are what they should be: plain files of a bounded size.

A model directory or a checkpoint may hold a pipe, a device, a git-lfs pointer or a file that was cut. Each is named
before a library opens it, which might wait for ever, fill the memory, or end in words of its own.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_popsd.errors import UserError

JSON_BYTES = 64 << 20
"""Largest JSON file that is read whole; the index of the largest models has some 10 MiB."""
YAML_BYTES = 4 << 20
"""Largest YAML file that is read."""
_YAML_NODES = 1_000_000
_POINTER = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def unreadable(file: Path) -> str | None:
    """Why `file` cannot be read, in words that follow its name; None for a plain file with content. Follows links.

    Nothing but a plain file is opened.
    """
    try:
        mode = file.stat()
        if not stat.S_ISREG(mode.st_mode):
            return f"is {next((name for kind, name in _KINDS if kind(mode.st_mode)), 'of an unknown kind')}, no file"
        if mode.st_size == 0:
            return "is empty"
        with file.open("rb") as opened:
            begin = opened.read(len(_POINTER))
    except OSError as error:
        lost = file.is_symlink() and isinstance(error, FileNotFoundError)
        return "is a link to nothing" if lost else f"cannot be read ({error.strerror})"
    return "is a git-lfs pointer in place of the file (run `git lfs pull`)" if begin == _POINTER else None


def read_text(file: Path, what: str, *, fix: str, limit: int = JSON_BYTES) -> str:
    """The text of a plain UTF-8 file.

    Args:
        file: to read.
        what: for the message: whose file it is.
        fix: for the message.
        limit: largest size in bytes.

    Raises:
        UserError: it is no plain file, too large, or no UTF-8.
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
        raise UserError(what, got=f"{file.name}, which {reason}", need="a plain text file", fix=fix)
    return text


def read_json(file: Path, what: str, *, fix: str, kind: type = dict) -> Any:
    """The value in a JSON file, read strictly: no key twice in an object, every number finite.

    Args:
        file: to read.
        what: for the message: whose file it is.
        fix: for the message.
        kind: `dict` or `list`, which the value must be.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    text = read_text(file, what, fix=fix)
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    else:
        if isinstance(value, kind):
            return value
        reason = f"a JSON {type(value).__name__}"
    need = "a JSON object" if kind is dict else "a JSON list"
    raise UserError(what, got=f"{file.name}: {reason}", need=need, fix=fix)


def check_yaml(text: str) -> None:
    """Refuse YAML that is small in a file and enormous in memory, by aliases of aliases.

    Raises:
        yaml.YAMLError: such a text, or none that is YAML; it describes which.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _expanded(node, {}) > _YAML_NODES:
            raise yaml.YAMLError(f"aliases that expand to more than {_YAML_NODES} values")
    except RecursionError:
        raise yaml.YAMLError("values nested too deeply") from None


def foreign_entry(directory: Path) -> str | None:
    """What a directory that somebody else made must not hold, in words; None where there is nothing of the kind.

    That is a symbolic link that leads out of it, or something that is neither a file nor a directory. `directory`
    itself may be a link. A snapshot in a Hugging Face cache consists of links into the ``blobs`` beside it; these count
    as inside.
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


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def _not_finite(word: str) -> float:
    raise ValueError(f"the number {word}, which is not finite")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _not_finite(digits)


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below `node`, where each alias counts as often as it is used; infinite for one that contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]
