"""Interpolations (``${seed}``, ``${oc.env:HOME}``): OmegaConf resolves each once; this module types the results."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_popsd.config.keys import wrong_type
from nemo_popsd.config.values import LONGEST_TEXT, from_interpolation
from nemo_popsd.errors import UserError
from nemo_popsd.settings.checks import shown

_MOST = 25  # including the one in the default of `output`
_NAMES = re.compile(r"(\.*)([A-Za-z_][\w.]*)")
_PLAIN = re.compile(r"\$\{[A-Za-z_][\w.]*\}")
"""An interpolation that consists of the name of a key."""


def escaped(value: object) -> object:
    """Escape the strings in `value` (string, list, mapping or section), so that OmegaConf does not interpolate them."""
    if is_dataclass(value):
        result = copy.copy(value)  # skips the checks: an escaped pattern may be invalid
        for item in fields(value):
            setattr(result, item.name, escaped(getattr(value, item.name)))
        return result
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    return value


def resolve(values: dict[str, object], known: Mapping[str, object], what: str) -> None:
    """Replace the interpolations in `values` by their results, which are parsed like literal values.

    Args:
        values: values by dotted key; changed in place.
        known: types of the keys.
        what: name for messages.

    Raises:
        UserError: an interpolation cannot be resolved, refers to itself, or gives a value of the wrong type.
    """
    unresolved = [key for key, value in values.items() if any("${" in text for text in _texts(value))]
    if not unresolved:
        return
    count = sum(text.count("${") for value in values.values() for text in _texts(value))
    if count > _MOST:
        got, need = f"{count} interpolations ${{...}}", f"at most {_MOST}"
        raise UserError(what, got=got, need=need, fix="replace some of them by values")
    _Resolution(values, known, what, unresolved).run()


class _Resolution:
    """Resolves the keys that a string refers to before the string itself, so that each value is resolved once."""

    def __init__(
        self, values: dict[str, object], known: Mapping[str, object], what: str, unresolved: list[str]
    ) -> None:
        self._values = values
        self._known = known
        self._what = what
        self._open = dict.fromkeys(unresolved)
        self._started: set[str] = set()

    def run(self) -> None:
        nested: dict[str, Any] = {}
        for key, value in self._needed().items():
            *sections, leaf = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = None if key in self._open else value
        self._tree = OmegaConf.create(nested)
        while self._open:
            self._resolve(next(iter(self._open)))

    def _needed(self) -> dict[str, object]:
        """Return the values that an interpolation can refer to: copying all settings takes OmegaConf milliseconds."""
        texts = [text for key in self._open for text in _texts(self._values[key])]
        if any("${" in _PLAIN.sub("", text) for text in texts):
            return self._values
        named = {f"{name}." for key in self._open for name in self._referred(key)}

        def is_needed(key: str) -> bool:
            return key in self._open or any(f"{key}.".startswith(name) or name.startswith(f"{key}.") for name in named)

        return {key: value for key, value in self._values.items() if is_needed(key)}

    def _resolve(self, key: str) -> None:
        if key in self._started:
            raise self._refused(key, "it refers to itself")
        self._started.add(key)
        for other in self._referred(key):
            if other in self._open:
                self._resolve(other)
        hint = self._known[key]
        try:
            OmegaConf.update(self._tree, key, self._values[key])
            result = OmegaConf.select(self._tree, key)
            result = OmegaConf.to_container(result, resolve=True) if OmegaConf.is_config(result) else result
        except (OmegaConfBaseException, RecursionError) as error:
            lines = str(error).splitlines()
            raise self._refused(key, lines[0][:200] if lines else "it cannot be resolved") from None
        if any(len(text) > LONGEST_TEXT for text in _texts(result)):
            raise self._refused(key, f"it gives more than {LONGEST_TEXT:,} characters")
        try:
            value = from_interpolation(hint, result)
        except ValueError:
            raise wrong_type(self._what, key, hint, f"{key}={shown(result)} from an interpolation") from None
        self._values[key] = value
        OmegaConf.update(self._tree, key, escaped(value))
        del self._open[key]

    def _referred(self, key: str) -> Iterator[str]:
        """Yield the keys named in the interpolations of `key`; a relative name begins with dots."""
        for text in _texts(self._values[key]):
            for dots, name in _NAMES.findall(text[text.find("${") :]):
                section = key.split(".")[: -len(dots)] if dots else []
                yield ".".join([*section, name.rstrip(".")])

    def _refused(self, key: str, problem: str) -> UserError:
        return UserError(
            self._what,
            got=f"{key}={shown(self._values[key])}: {problem}",
            need="an interpolation of a known key or of a variable, as in ${name} or ${oc.env:HOME} "
            "(write \\${ for literal text)",
            fix=f"set {key}",
        )


def _texts(value: object) -> list[str]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [text for text in items if isinstance(text, str)]
