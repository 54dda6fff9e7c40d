"""Reading the JSON that runs and other programs wrote, which may be cut, damaged or something else altogether."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nemo_popsd.errors import UserError

T = TypeVar("T")


def open_regular(path: Path) -> BinaryIO:
    """Opens `path` for reading if it is a regular file: others may be waited for, or read, without end.

    Raises:
        OSError: it is none, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file but a directory, a device or a pipe", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is no readable file of JSON.
    """
    return parse_json(_content(path), path)


def read_json_lines(path: Path, *, cut: bool = False) -> Iterator[tuple[str, Any]]:
    """Place (file and line, for messages) and value of each line of a JSON Lines file.

    Args:
        path: the file.
        cut: pass over a last line without its end, which a kill may leave.

    Raises:
        UserError: a line is no JSON, or the file cannot be read.
    """
    *whole, last = _content(path).split(b"\n")
    for number, line in enumerate(whole if cut else [*whole, last], start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, parse_json(line, where)


def parse_json(text: bytes | str, where: object) -> Any:
    """The value of a JSON `text`.

    Raises:
        UserError: it is none.
    """
    try:
        value = json.loads(text)
        raw = text.encode() if isinstance(text, str) else text
        if rb"\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        problem = "nested without end" if isinstance(error, RecursionError) else str(error)
        raise damaged(where, problem) from None
    return value


def as_dataclass(kind: type[T], value: object, where: object) -> T:
    """`value` as a dataclass of type `kind`, whose fields it must have, and in their types.

    Raises:
        UserError: something is missing, left over, or has another type.
    """
    hints = _hints(cast(Any, kind))
    if not isinstance(value, Mapping):
        raise damaged(where, f"{_shown(value)} where an object belongs")
    unlike = sorted(set(map(str, value)) - set(hints))
    if unlike:
        raise damaged(where, f"{_shown(unlike[0])} among its names")
    for name, content in value.items():
        if not _is(hints[name], content):
            raise damaged(where, f"{name}={_shown(content)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise damaged(where, str(error).partition(".")[2] or str(error)) from None


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damaged(where: object, problem: str) -> UserError:
    """The error for content that no program of ours wrote like that."""
    return UserError(
        str(where),
        got=f"damaged data ({problem[:200]})",
        need="the file as it was written",
        fix="restore it from a copy, or remove it",
    )


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _is(kind: Any, value: object) -> bool:
    """Whether `value`, as JSON gave it, has the type `kind`; a tuple is a list there."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is(part, value) for part in inside)
    if origin is dict:
        return isinstance(value, dict) and all(_is(inside[1], item) for item in value.values())
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is(inside[0], item) for item in value)
    if kind is float:
        return isinstance(value, float) or _is(int, value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, type(None) if kind is None else kind)


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise UserError(
            str(path), got=f"no readable file ({problem})", need="a file of JSON", fix="correct or remove it"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
