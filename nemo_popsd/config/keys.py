"""What the schema allows: its dotted keys, the type of each, and the known key nearest to a misspelt one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError

_NEEDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (quote it)"}


@cache
def known_keys() -> Mapping[str, Any]:
    """Dotted name of every section and every setting, with its type; sections have a dataclass as type."""
    found: dict[str, Any] = {}

    def visit(section: type, prefix: str) -> None:
        hints = get_type_hints(section)
        for item in fields(section):
            name = prefix + item.name
            found[name] = hints[item.name]
            if is_dataclass(hints[item.name]):
                visit(hints[item.name], name + ".")

    visit(PopsdConfig, "")
    return found


def nearest(key: str) -> str | None:
    """The known key that `key` most likely means: by its whole name, else by its last part; None if none is near."""
    settings = [name for name, kind in known_keys().items() if not is_dataclass(kind)]
    sections = [name for name in known_keys() if name not in settings and not key.startswith(f"{name}.")]
    for candidates in (settings, sections):
        whole = difflib.get_close_matches(key, candidates, n=1, cutoff=0.7)
        if whole:
            return whole[0]
    leaves = {_leaf(name): name for name in reversed(settings)}
    last = difflib.get_close_matches(_leaf(key), leaves, n=1, cutoff=0.7)
    return leaves[last[0]] if last else None


def unknown_key(where: str, key: str) -> UserError:
    """The error for a key that the schema does not have, told at `where` (file and line, or the override)."""
    near = nearest(key)
    section = key.rpartition(".")[0]
    if near is not None:
        need = f"a known key; the nearest is {near}"
    elif section in known_keys():
        inside = [_leaf(name) for name in known_keys() if name.rpartition(".")[0] == section]
        need = f"a key of {section}: {', '.join(inside)}"
    else:
        need = "a known key; sections are " + ", ".join(
            name for name, kind in known_keys().items() if "." not in name and is_dataclass(kind)
        )
    return UserError(where, got=f"unknown key {key}", need=need, mend="rename it or take it out")


def wrong_type(where: str, key: str, value: object) -> UserError:
    """The error for a `value` that `key` cannot hold, told at `where`."""
    return UserError(where, got=f"{key}={value!r}", need=describe(known_keys()[key]), mend=f"set {key}")


def describe(kind: Any) -> str:
    """What a value of type `kind` looks like in a file, in words."""
    if is_dataclass(kind):
        return "a section with keys of its own"
    if _is_optional(kind):
        return " or ".join([describe(_inner(kind)), "null"])
    if get_origin(kind) is list:
        return "a list of numbers, as in [0.1, 1]" if float in get_args(kind) else "a list of texts, as in [a, b]"
    return _NEEDS[kind]


def accepts(kind: Any, value: object) -> bool:
    """Whether a setting of type `kind` may hold `value` as YAML gave it; an interpolation is judged once resolved."""
    if isinstance(value, str) and "${" in value:
        return True
    if _is_optional(kind):
        return value is None or accepts(_inner(kind), value)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(accepts(get_args(kind)[0], item) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def is_text(kind: Any) -> bool:
    """Whether `kind` is text, optional or not."""
    return kind is str or (_is_optional(kind) and _inner(kind) is str)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _inner(kind: Any) -> Any:
    return next(argument for argument in get_args(kind) if argument is not type(None))
