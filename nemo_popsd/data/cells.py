"""Text, answers and messages of one row, from the columns that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from nemo_popsd.data.readers import MalformedError
from nemo_popsd.data.records import is_blank

_ROLES = {"question": "user", "reference": "assistant"}
_NO_ANSWERS = frozenset(("nan", "<na>"))
"""Strings that pandas writes for a missing value."""


def text_of(row: Mapping[str, object], column: str, *, field: str) -> str:
    """Return the unchanged text of `column`.

    A column of chat messages must contain exactly one message of the field's role.

    Args:
        row: the row.
        column: name of the column; a dot separates a column from a field in it or from a list index.
        field: `question` (the user's message) or `reference` (the assistant's message).

    Raises:
        MalformedError: the column is missing, empty, or of another type.
    """
    value = _cell(row, column)
    if isinstance(value, list):
        value = _message(value, column, field)
    return _checked(value, column)


def scalar_of(row: Mapping[str, object], column: str) -> str:
    """Return the text of `column` without outer spaces, or its number in plain notation: 18, not 18.0 or 1e+16.

    Raises:
        MalformedError: the column is missing, empty, NaN or infinite, or of another type.
    """
    value = _cell(row, column)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _written(value, column)
    text = _checked(value, column).strip()
    if text.lower() in _NO_ANSWERS:
        raise MalformedError(f"column {column!r} holds {text!r}, a missing value")
    return text


def view_of(row: Mapping[str, object], column: str) -> str:
    """Return the text of `column`, its assistant message, or its number, by the type of its content.

    Raises:
        MalformedError: the column is missing, empty, or of another type.
    """
    if isinstance(_cell(row, column), (str, list)):
        return text_of(row, column, field="reference")
    return scalar_of(row, column)


def _written(value: float | Decimal, column: str) -> str:
    if not math.isfinite(value):
        raise MalformedError(f"column {column!r} holds {value}, which is not a number")
    if value == int(value):
        return str(int(value))
    return format(Decimal(repr(value)) if isinstance(value, float) else Decimal(value), "f")


def _cell(row: Mapping[str, object], column: str) -> object:
    if column in row:
        value = row[column]
    else:
        name, *fields = column.split(".")
        if name not in row:
            raise MalformedError(f"no column {column!r}, only {', '.join(row) or '(none)'}")
        value = row[name]
        for depth, field in enumerate(fields):
            value = _field(value, field, ".".join((name, *fields[:depth])))
    if value is None:
        raise MalformedError(f"column {column!r} is null")
    return value


def _field(value: object, field: str, where: str) -> object:
    if value is None:
        raise MalformedError(f"column {where!r} is null")
    if isinstance(value, Mapping):
        if field not in value:
            raise MalformedError(f"no field {field!r} in column {where!r}, only {', '.join(value) or '(none)'}")
        return value[field]
    if isinstance(value, list) and field.lstrip("-").isdecimal():
        if not -len(value) <= int(field) < len(value):
            raise MalformedError(f"no item {field} in column {where!r}, which has {len(value)}")
        return value[int(field)]
    raise MalformedError(f"column {where!r} holds {_type_name(value)}, which has no field {field!r}")


def _message(messages: list[Any], column: str, field: str) -> object:
    """Return the content of the only message with the role of `field`."""
    role = _ROLES[field]
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if None in roles or not roles:
        raise MalformedError(f"column {column!r} holds a list, not text or messages with role and content")
    hint = f"; name one message, as in {column}.0.content"
    if not set(roles) <= {"user", "assistant"}:
        other = next(unknown for unknown in roles if unknown not in ("user", "assistant"))
        raise MalformedError(f"column {column!r} holds a message of role {other!r}, which would be ignored{hint}")
    if roles.count(role) != 1 or roles.count("user") > 1:
        counts = f"{roles.count('user')} messages of the user and {roles.count('assistant')} of the assistant"
        raise MalformedError(f"column {column!r} holds {counts}, not one {role} message{hint}")
    return messages[roles.index(role)].get("content")


def _checked(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise MalformedError(f"column {column!r} holds {_type_name(value)}, not text")
    if is_blank(value):
        raise MalformedError(f"column {column!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedError(f"column {column!r} holds an unpaired surrogate") from None
    return value


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
