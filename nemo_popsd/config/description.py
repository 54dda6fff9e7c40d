"""Description of each setting: name, type, default, bounds and the string below its field.

`popsd config --describe` and the generated reference (`docs/reference.py`) use it. Imports neither torch nor yaml. The
strings are read from the source files, because Python discards them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from nemo_popsd.config.keys import known_keys, unknown_key
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.settings.bounds import Text

_TEXTS = {
    Text.LINE: "one line",
    Text.NAME: "a short line, not empty",
    Text.PATH: "a path; a leading `~` is the home directory",
    Text.PROSE: "text of any number of lines",
}


_WIDTH = 100


class Setting(NamedTuple):
    """One setting of a configuration, or one section."""

    name: str
    """Dotted name, as in an override."""
    type: str
    """Type in Python's notation; empty for a section."""
    default: str
    """Default in YAML; empty for a section."""
    allowed: str
    """Bounds in words; may be empty."""
    text: str
    """The string below the field; for a section, the docstring of its class."""


def describe(name: str, schemas: Sequence[type] = (PopsdConfig,), *, values: Mapping[str, object] | None = None) -> str:
    """Describe a setting, or a section with all its settings, for the terminal.

    Args:
        name: dotted name.
        schemas: dataclasses to search.
        values: values of a configuration by dotted name; those that differ from the default are shown.

    Raises:
        UserError: no schema has the name; the message names the nearest one.
    """
    declared = {setting.name: setting for schema in schemas for setting in settings(schema)}
    if name not in declared:
        known = {key: hint for schema in schemas for key, hint in known_keys(schema).items()}
        raise unknown_key("--describe", name, known)
    inside = [setting for key, setting in declared.items() if key == name or key.startswith(f"{name}.")]
    return "\n\n".join(_described(setting, values or {}) for setting in inside)


def _described(setting: Setting, values: Mapping[str, object]) -> str:
    text = textwrap.indent(textwrap.fill(" ".join(setting.text.split()), _WIDTH - 4), "    ")
    if not setting.type:
        return f"{setting.name}: a section\n{text}"
    facts = [setting.type, f"default {setting.default}", *([setting.allowed] if setting.allowed else [])]
    value = _yaml_text(values[setting.name]) if setting.name in values else setting.default
    here = "" if value == setting.default else f"\n    Here: {value}"
    return f"{setting.name}: {', '.join(facts)}\n{text}{here}"


def field_texts(schema: ast.ClassDef) -> dict[str, str]:
    """Map each field to the string below it, in the order of declaration; "" if there is none."""
    found: dict[str, str] = {}
    last = ""
    for node in schema.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
            found[last] = ""
        elif last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[last] = inspect.cleandoc(str(node.value.value))
            last = ""
        else:
            last = ""
    return found


def class_node(path: Path, name: str) -> ast.ClassDef:
    """Return the syntax tree of the class `name` in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [node] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return node


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of the dataclass `schema`: its own first, then each section with its settings."""
    texts = field_texts(class_node(Path(inspect.getfile(schema)), schema.__name__))
    types, declared = get_type_hints(schema), get_type_hints(schema, include_extras=True)
    sections = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[field.name]):
            sections.append(field.name)
            continue
        yield Setting(
            prefix + field.name,
            _type_name(types[field.name]),
            _yaml_text(_default(field)),
            _allowed(declared[field.name]),
            texts[field.name],
        )
    for name in sections:
        yield Setting(prefix + name, "", "", "", inspect.cleandoc(types[name].__doc__ or ""))
        yield from settings(types[name], f"{prefix}{name}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _type_name(hint: Any) -> str:
    """Format `hint` as in source code: int | None, list[str]."""
    return hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)


def _yaml_text(value: Any) -> str:
    """Format `value` as in a configuration file, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml_text, value))}]"
    if isinstance(value, str):
        return repr(value) if value == "" or "\n" in value or value != value.strip() else value
    return str(value)


def _allowed(hint: Any) -> str:
    """Describe the rule of an annotated type in words: an interval, or the kind of text."""
    rules = getattr(hint, "__metadata__", ())
    return ", ".join(_TEXTS[rule] if isinstance(rule, Text) else str(rule) for rule in rules)
