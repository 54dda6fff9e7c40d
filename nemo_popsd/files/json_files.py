"""Reading of JSON: the files that runs wrote, which may be truncated or damaged, and the rules for other JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nemo_popsd.errors import UserError

T = TypeVar("T")


def open_regular(path: Path) -> BinaryIO:
    """Opens `path` for reading if it is a regular file: a pipe may block and a device may have no end.

    Raises:
        OSError: it is not a regular file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "a directory, a device or a pipe, not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        UserError: the file is not readable, or not JSON.
    """
    return parse_json(_content(path), path)


def read_json_lines(path: Path, *, skip_partial: bool = False) -> Iterator[tuple[str, Any]]:
    """Location (file and line, for messages) and value of each line of a JSON Lines file.

    Args:
        path: the file.
        skip_partial: skip a last line without a newline, which a kill may leave.

    Raises:
        UserError: a line is not JSON, or the file cannot be read.
    """
    *complete, last = _content(path).split(b"\n")
    for number, line in enumerate(complete if skip_partial else [*complete, last], start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, parse_json(line, where)


def parse_json(text: bytes | str, where: object) -> object:
    """The value of a JSON `text`.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return decode_json(text)
    except ValueError as error:
        raise damaged(where, str(error)) from None


def decode_json(text: bytes | str, *, strict: bool = False) -> object:
    """The value of a JSON `text`, in which no string holds an unpaired surrogate.

    Args:
        text: to decode.
        strict: require that no object repeats a key and that every number is finite.

    Raises:
        ValueError: gives the reason in one phrase.
    """
    try:
        if strict:
            value: object = json.loads(
                text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant, parse_float=_finite
            )
        else:
            value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    raw = text.encode() if isinstance(text, str) else text
    if rb"\ud" in raw.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def as_dataclass(kind: type[T], value: object, where: object) -> T:
    """`value` as an instance of the dataclass `kind`, with exactly its fields, each of the declared type.

    Raises:
        UserError: a field is missing, unknown or of another type.
    """
    hints = _hints(cast(Any, kind))
    if not isinstance(value, Mapping):
        raise damaged(where, f"{_shown(value)} in place of an object")
    unknown = sorted(set(map(str, value)) - set(hints))
    if unknown:
        raise damaged(where, f"the unknown key {_shown(unknown[0])}")
    for name, content in value.items():
        if not _is(hints[name], content):
            raise damaged(where, f"{name}={_shown(content)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise damaged(where, str(error).partition(".")[2] or str(error)) from None


def checksum(content: Mapping[str, object]) -> str:
    """SHA-256 of a JSON object, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damaged(where: object, problem: str) -> UserError:
    """The error for content that differs from what nemo_popsd writes."""
    return UserError(
        str(where),
        got=f"damaged data ({problem[:200]})",
        need="the file as it was written",
        fix="restore it from a copy, or remove it",
    )


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return get_type_hints(kind)


def _is(kind: Any, value: object) -> bool:
    """Whether `value`, decoded from JSON, has the type `kind`; JSON holds a tuple as a list."""
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
            str(path), got=f"an unreadable file ({problem})", need="a JSON file", fix="correct or remove it"
        ) from error


def unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: names a repeated key.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def _refuse_constant(word: str) -> float:
    raise ValueError(f"the number {word}, which is not finite")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
