"""Reading a YAML file or an override as a tree of known keys with typed values. All sizes are bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from nemo_popsd.config.keys import known_keys, unknown_key, wrong_type
from nemo_popsd.config.values import MISSING, inner, is_mapping, is_text, read_scalar
from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import open_regular
from nemo_popsd.settings.checks import shown

_MOST_BYTES = 1 << 17
_MOST_NODES = 5_000
_MOST_LEVELS = 16
_TOO_MUCH = f"more than {_MOST_NODES:,} values (aliases repeat theirs) or {_MOST_LEVELS} levels"
_TAGS = "tag:yaml.org,2002:"
_MERGE = f"{_TAGS}merge"
LISTED = ("evaluation.sets",)
"""Mappings that may be written as a list of names, each with an empty value; a list replaces the default names."""
_QUOTED = ("'", '"', "|", ">")


def read_file(path: Path) -> dict[str, object]:
    """Return the tree of a configuration file.

    Values have the types of their keys. Strings with ``${`` are interpolations, which are resolved later; `MISSING` is
    kept.

    Raises:
        UserError: the file is not a regular file, is too large, or is not YAML in UTF-8; or it has unknown or repeated
            keys or a value of a wrong type.
    """
    what = f"configuration {_named(path)}"
    node = _compose(_text(path), what, lambda line: f"{_named(path)}:{line}")
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(what, got="no keys at the top", need="a YAML mapping of keys to values", fix="correct the file")
    return _Tree(known_keys(), path).section(node, "", 0)


def read_override(override: str, known: Mapping[str, object] | None = None) -> tuple[str, Any]:
    """Return key and value of one ``key=value``.

    Args:
        override: the override; the value is YAML, except that the value of a text key is literal unless it is ``null``
            or quoted.
        known: keys and types; by default those of a run.

    Raises:
        UserError: the override has no key or no value, the key is unknown, or the value has the wrong type.
    """
    known = known_keys() if known is None else known
    where = f"override {shown(override)}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(where, got="no key and value", need="key=value, as in training.steps=20", fix="correct it")
    section, _, name = key.rpartition(".")
    if name and is_mapping(known.get(section)):
        return section, {name: text}
    hint = known.get(key)
    if hint is None:
        raise unknown_key(where, key, known)
    if is_text(hint) and text not in ("null", "~") and text[:1] not in ("'", '"'):
        return key, text
    node = _compose(text, where, lambda _: where)
    if node is None:
        raise wrong_type(where, key, hint, f"{key}= without a value")
    return key, _Tree(known, where).value(node, key, hint, 0, where)


def _text(path: Path) -> str:
    what, need = f"configuration {_named(path)}", "a YAML file"
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(what, got=f"no readable file ({reason})", need=need, fix="correct the path") from None
    if len(data) > _MOST_BYTES:
        got = f"more than {_MOST_BYTES // 1024} KiB"
        raise UserError(what, got=got, need="a configuration, which is smaller", fix="correct the path")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 ({error.reason} at byte {error.start})"
        raise UserError(what, got=got, need=need, fix="save it as UTF-8, or correct the path") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Composes nodes with limits on number and depth. Tags are refused, because keys determine the types."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._levels = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        self._levels += 1
        event = self.peek_event()
        if self._nodes > _MOST_NODES or self._levels > _MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, _TOO_MUCH, event.start_mark)
        tag = getattr(event, "tag", None)
        if tag is not None:
            problem = f"the tag {shown(tag.replace(_TAGS, '!!'))}, which is not supported"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node


def _compose(text: str, what: str, where: Callable[[int], str]) -> yaml.Node | None:
    """Return the root of the single document in `text`."""
    need, fix = "valid YAML", "correct it (quote text values)"
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(where(line), got=_problem(error), need=need, fix=fix) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise UserError(what, got=_first_line(error), need=need, fix=fix) from None


class _Tree:
    """Converts nodes to values. Values are counted again, because an alias is one node but may produce many values."""

    def __init__(self, known: Mapping[str, object], origin: Path | str) -> None:
        self._known = known
        self._origin = origin
        self._nodes = 0

    def section(self, node: yaml.MappingNode, prefix: str, level: int) -> dict[str, object]:
        """Return the values of one section; `prefix` is its dotted name with a trailing dot."""
        values: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in self._merged(node, level):
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            key, where = f"{prefix}{name}", self._where(key_node)
            if name is None or "." in name or key not in self._known:
                if name is not None and "." in name and key in self._known:
                    nested = ": {".join(name.split(".")) + ": ..." + "}" * name.count(".")
                    raise UserError(where, got=f"{name} as one key", need="a key below its section", fix=nested)
                raise unknown_key(where, key if name is not None else f"{prefix}[{key_node.id}]", self._known)
            if name in lines:
                got = f"{key} again, first in line {lines[name]}"
                raise UserError(where, got=got, need="each key once", fix="remove one of them")
            lines[name] = key_node.start_mark.line + 1
            values[name] = self.value(value_node, key, self._known[key], level + 1, where)
        return values

    def value(self, node: yaml.Node, key: str, hint: object, level: int, where: str, need: object = None) -> object:
        """Return the value of `node` for `key` of type `hint`; for a list item, `need` is the type of the list."""
        self._count(level)
        if isinstance(node, yaml.ScalarNode) and (node.value == MISSING or "${" in node.value):
            if is_dataclass(hint):
                raise wrong_type(where, key, hint, f"{key}={shown(node.value)}")
            return node.value
        if is_dataclass(hint):
            if isinstance(node, yaml.MappingNode):
                return self.section(node, f"{key}.", level)
        elif is_mapping(hint) and isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, level)
        elif is_mapping(hint) and key in LISTED and isinstance(node, yaml.SequenceNode):
            return [self.value(item, key, str, level + 1, where, need=list[str]) for item in node.value]
        elif get_origin(hint) is list and isinstance(node, yaml.SequenceNode):
            return [self.value(item, key, get_args(hint)[0], level + 1, where, need=hint) for item in node.value]
        elif isinstance(node, yaml.ScalarNode) and node.style in _QUOTED:
            if inner(hint) is str:
                return node.value
        elif isinstance(node, yaml.ScalarNode):
            try:
                return read_scalar(hint, node.value)
            except ValueError:
                pass
        raise wrong_type(where, key, need or hint, f"{key}={_written(node)}")

    def _mapping(self, node: yaml.MappingNode, key: str, level: int) -> dict[str, str]:
        """Return names and scalar values as strings; the users of the mapping know the types."""
        values: dict[str, str] = {}
        for key_node, value_node in self._merged(node, level):
            self._count(level + 1)
            where = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(value_node, yaml.ScalarNode):
                got = f"{key} with {_written(key_node)}: {_written(value_node)}"
                raise UserError(where, got=got, need="names with one value each", fix=f"set {key}")
            if key_node.value in values:
                got = f"{key}.{key_node.value} again"
                raise UserError(where, got=got, need="each key once", fix="remove one of them")
            values[key_node.value] = value_node.value
        return values

    def _merged(self, node: yaml.MappingNode, level: int) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the pairs of `node`, and the merged pairs (``<<``) whose keys `node` does not have."""
        self._count(level)
        pairs = [(key, value) for key, value in node.value if key.tag != _MERGE]
        for _, value in (pair for pair in node.value if pair[0].tag == _MERGE):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    got = f"<< of {_written(source)}"
                    raise UserError(self._where(source), got=got, need="a mapping to merge", fix="write its keys out")
                own = {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}
                pairs += [pair for pair in self._merged(source, level + 1) if pair[0].value not in own]
        return pairs

    def _count(self, level: int) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES or level > _MOST_LEVELS:
            what = f"configuration {_named(self._origin)}" if isinstance(self._origin, Path) else self._origin
            raise UserError(what, got=_TOO_MUCH, need="a configuration, which is smaller", fix="remove aliases")

    def _where(self, node: yaml.Node) -> str:
        return f"{_named(self._origin)}:{node.start_mark.line + 1}" if isinstance(self._origin, Path) else self._origin


def _named(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else shown(text)


def _written(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    quoted = node.style in _QUOTED or not node.value.isprintable() or len(node.value) > 100
    return shown(node.value) if quoted else node.value or "nothing"


def _problem(error: yaml.MarkedYAMLError) -> str:
    return _first_line(", ".join(part for part in (error.context, error.problem) if part) or error)


def _first_line(error: object) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else "nothing readable"
