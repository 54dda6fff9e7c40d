"""Converting the text of a file or an override to a value, by the type of the setting, not by the form of the text.

YAML 1.1 reads `1:30` as 90, `010` as 8, `on` as true and `2026-11-28` as a date. Here a number is decimal, a Boolean is
`true` or `false`, and the value of a text setting is its literal text.
"""

from __future__ import annotations

import math
import re
import types
import unicodedata
from collections.abc import Mapping
from typing import Union, get_args, get_origin

from nemo_popsd.config.paths import given_path
from nemo_popsd.settings.bounds import Text
from nemo_popsd.settings.checks import refuse

_NEEDS: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number in decimal digits",
    float: "a number (0.5, 1e-5)",
    str: "text (quote it)",
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = ("", "~", "null", "Null", "NULL")
_LONGEST_NUMBER = 40
LONGEST_TEXT = 20_000
"""Maximum length of any text, in characters."""
_LONGEST = {Text.NAME: 200, Text.LINE: 2_000, Text.PATH: LONGEST_TEXT, Text.PROSE: LONGEST_TEXT}

MISSING = "???"
"""OmegaConf's marker for a missing value."""


def read_scalar(hint: object, text: str) -> object:
    """Parse an unquoted `text` as a value of type `hint`.

    Raises:
        ValueError: `text` is not a value of this type.
    """
    if text in _NULL:
        if is_optional(hint):
            return None
        raise ValueError
    hint = inner(hint)
    if hint is str:
        return text
    if hint is bool:
        if text in _TRUTH:
            return _TRUTH[text]
        raise ValueError
    if hint is int and len(text) <= _LONGEST_NUMBER and _WHOLE.fullmatch(text):
        return int(text)
    if hint is float:
        not_finite = _NOT_FINITE.fullmatch(text)
        if not_finite:
            return float(
                not_finite[1] + not_finite[2]
            )  # refused by the bounds of the setting, whose message names them
        if _NUMBER.fullmatch(text):
            return float(text)
    raise ValueError


def from_plain(hint: object, value: object) -> object:
    """Convert `value`, as returned by YAML or an interpolation, to type `hint`.

    Raises:
        ValueError: `value` has another type.
    """
    if value is None and is_optional(hint):
        return None
    hint = inner(hint)
    if get_origin(hint) is list and isinstance(value, list):
        return [from_plain(get_args(hint)[0], item) for item in value]
    if is_mapping(hint) and isinstance(value, Mapping):
        return {str(key): from_plain(str, item) for key, item in value.items()}
    if is_mapping(hint) and isinstance(value, list):  # a list of names, as written by earlier versions
        return {str(from_plain(str, item)): "" for item in value}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError


def from_interpolation(hint: object, value: object) -> object:
    """Convert the result of an interpolation like `from_plain`; strings are parsed like literal values.

    Raises:
        ValueError: `value` has another type.
    """
    if get_origin(hint) is list and isinstance(value, list):
        return [from_interpolation(get_args(hint)[0], item) for item in value]
    if isinstance(value, str) and inner(hint) is not str:
        return read_scalar(hint, value)
    if inner(hint) is str and isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return from_plain(hint, value)


def check_text(setting: str, value: str, rule: Text) -> str:
    """Check characters and length of `value` against `rule`, and expand `~` in a path.

    Raises:
        UserError: `value` violates the rule.
    """
    allowed = "\t\n\r\u2028\u2029" if rule is Text.PROSE else "\t" if rule is Text.LINE else ""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            need = f"text without control characters (this one has U+{ord(character):04X})"
            raise refuse(setting, value, need)
    if len(value) > _LONGEST[rule] or (rule is Text.NAME and not value):
        least = 1 if rule is Text.NAME else 0
        raise refuse(setting, value, f"text of {least} to {_LONGEST[rule]:,} characters")
    return given_path(setting, value) if rule is Text.PATH else value


def describe(hint: object) -> str:
    """Describe in words a value of type `hint` in a file."""
    if is_optional(hint):
        return " or ".join([describe(inner(hint)), "null"])
    if is_mapping(hint):
        return "a mapping of names to values"
    if get_origin(hint) is list:
        item = get_args(hint)[0]
        examples = {int: "whole numbers, as in [1, 4]", float: "numbers, as in [0.1, 1]", str: "texts, as in [a, b]"}
        return f"a list of {examples[item]}"
    return _NEEDS.get(hint, "a section with its own keys")


def is_text(hint: object) -> bool:
    """Whether `hint` is text, optional or not."""
    return inner(hint) is str


def is_mapping(hint: object) -> bool:
    """Whether `hint` is a mapping from names that the schema does not list to strings."""
    return get_origin(hint) is dict


def is_optional(hint: object) -> bool:
    """Whether a setting of type `hint` may be null."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def inner(hint: object) -> object:
    """Return `hint` without null."""
    return next(part for part in get_args(hint) if part is not type(None)) if is_optional(hint) else hint


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.copysign(math.inf, value)
