"""The dotted keys of a schema with their types, and the known keys nearest to a misspelt key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import cast

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.values import describe
from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import hints
from nemo_popsd.settings.checks import shown

_CLOSE = 0.7
_MOST_NAMED = 3


@cache
def known_keys(schema: type = PopsdConfig) -> Mapping[str, object]:
    """Return the dotted name of every section and setting, with its type; the type of a section is a dataclass."""
    keys: dict[str, object] = {}

    def visit(section: type, prefix: str) -> None:
        for field, hint in hints(section).items():
            name = prefix + field
            keys[name] = hint
            if is_dataclass(hint):
                visit(cast(type, hint), name + ".")

    visit(schema, "")
    return keys


def nearest(key: str, known: Mapping[str, object]) -> list[str]:
    """Return the keys of `known` that `key` most likely means; empty if none is close, several if equally likely.

    In order of preference: a misspelt key of the same section, the same name elsewhere in the top-level section, a
    misspelt section, the same name anywhere. The first letter must match: `node` may mean `nodes`, but not `mode`.
    """
    key = key[:200]  # difflib takes quadratic time
    section, _, leaf = key.rpartition(".")
    settings = [name for name, hint in known.items() if not is_dataclass(hint)]
    sections = [name for name, hint in known.items() if is_dataclass(hint) and not key.startswith(f"{name}.")]
    top = key.partition(".")[0] if section else None
    siblings = [name for name in (*settings, *sections) if name.rpartition(".")[0] == section]
    around = [name for name in settings if top is not None and name.partition(".")[0] == top]
    for candidates in (
        _similar_leaf(leaf, siblings),
        _same_leaf(leaf, around),
        _similar_leaf(leaf, around),
        _similar_key(key, settings),
        _similar_key(key, sections),
        _same_leaf(leaf, settings),
        _similar_leaf(leaf, settings),
    ):
        if candidates:
            return candidates[:_MOST_NAMED]
    return []


def unknown_key(where: str, key: str, known: Mapping[str, object] | None = None) -> UserError:
    """Return the error for a key that the schema does not have.

    Args:
        where: file and line, or the override.
        key: dotted name of the key.
        known: keys and types; by default those of a run.
    """
    known = known_keys() if known is None else known
    near = nearest(key, known)
    section = key.rpartition(".")[0]
    if near:
        need = f"a known key; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
    elif section in known and is_dataclass(known[section]):
        inside = [_leaf(name) for name in known if name.rpartition(".")[0] == section]
        need = f"a key of {section}: {', '.join(inside)}"
    else:
        top = [name for name in known if "." not in name]
        settings = [name for name in top if not is_dataclass(known[name])]
        need = f"a known key: {', '.join(settings)}, or one of a section; sections are " + ", ".join(
            name for name in top if is_dataclass(known[name])
        )
    return UserError(where, got=f"unknown key {_shown_key(key)}", need=need, fix="rename or remove it")


def wrong_type(where: str, key: str, hint: object, got: str) -> UserError:
    """Return the error for a value (described by `got`) of the wrong type for the setting `key` of type `hint`."""
    return UserError(where, got=got, need=describe(hint), fix=f"set {key}")


def _similar_leaf(leaf: str, names: Iterable[str]) -> list[str]:
    """Return the `names` whose last part is most similar to `leaf`, if close and with the same first letter."""
    alike = {name: difflib.SequenceMatcher(None, leaf, _leaf(name)).ratio() for name in names}
    alike = {name: ratio for name, ratio in alike.items() if ratio >= _CLOSE and _leaf(name)[:1] == leaf[:1]}
    return [name for name, ratio in alike.items() if ratio == max(alike.values())]


def _same_leaf(leaf: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if _leaf(name) == leaf]


def _similar_key(key: str, names: Iterable[str]) -> list[str]:
    return [name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.8) if name[:1] == key[:1]]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _shown_key(key: str) -> str:
    return key if key.isprintable() and key and len(key) <= 100 else shown(key)
