"""The recipes that ship with the package, and copies of them with other values.

`nemo_popsd/recipes` is a symbolic link to `conf/`: the wheel contains the recipes, and the repository stores them once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import yaml

from nemo_popsd.config.documents import read_override
from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.embedded.names import PREFIX
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.settings.bounds import Text, declared_rules

FOLDER = Path(__file__).parents[1] / "recipes"

_SOURCE = re.compile(r" +# (paper|OPSD|here)\b.*")
"""A comment that names the source of a value in a recipe."""

READ_PATHS = ("student.source", "data.train.path", "data.validation.path")
"""Settings with the inputs of a run."""


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def purpose(name: str) -> str:
    """The first sentence of the comment at the top of a recipe."""
    comment = re.match(r"(?:#.*\n)+", _text(name))
    words = " ".join(re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE).split("\n\n")[0].split()) if comment else ""
    return re.split(r"(?<=\.)\s", words)[0].rstrip(":.")


def write_recipe(name: str, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Write `<folder>/<name>.yaml`: the recipe with its comments and with `overrides` inserted.

    Existing paths in `overrides` are made absolute, so that the file can be used from any directory.

    Args:
        name: name of the recipe.
        folder: directory to write to; created if it does not exist.
        overrides: ``key=value``, as for `load_config`.

    Returns:
        The path of the file.

    Raises:
        UserError: no recipe has this name, the file exists or cannot be written, or an override is invalid.
    """
    if name not in recipe_names():
        raise UserError(
            "init", got=f"recipe {name!r}", need=f"one of {', '.join(recipe_names())}", fix="use one of them"
        )
    path = folder / f"{name}.yaml"
    if os.path.lexists(path):
        raise UserError("init", got=f"{path}, which exists", need="a new file", fix="use another DIR, or remove it")
    load_config(FOLDER / f"{name}.yaml", overrides)
    text = _text(name).replace(f"conf/{name}.yaml", str(path))
    for override in overrides:
        for key, value in _values(*read_override(override)):
            text = with_value(text, key, _absolute(key, value))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        got = f"{path} ({error.strerror})"
        raise UserError("init", got=got, need="a directory that can be written", fix="use another DIR") from None
    return path


def with_value(text: str, key: str, value: object) -> str:
    """Return the YAML `text` with `value` for the dotted `key`; everything else, including comments, is unchanged.

    A comment that names the source of the old value is replaced. A missing key is added at the end of its section.
    """
    node, parts = yaml.compose(text, Loader=yaml.SafeLoader), key.split(".")
    while isinstance(node, yaml.MappingNode) and parts:
        below = {item.value: inside for item, inside in node.value}.get(parts[0])
        if below is None:
            break
        node, parts = below, parts[1:]
    if not parts:
        start, end = node.start_mark.index, node.end_mark.index
        before = "" if text[start - 1].isspace() else " "  # a key without a value
        mark = _SOURCE.match(text, end)
        after = end if mark is None else mark.end()
        yours = "" if mark is None else f" # yours; the recipe has {text[start:end]}"
        return f"{text[:start]}{before}{_written(value)}{yours}{text[after:]}"
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    indent = " " * (node.value[0][0].start_mark.column if isinstance(node, yaml.MappingNode) else 0)
    added = "".join(f"{indent}{line}\n" for line in lines).rstrip() + f" {_written(value)}\n"
    text = text if text.endswith("\n") else f"{text}\n"
    if not indent:
        return f"{text}\n{added}"
    last = node
    while isinstance(last, yaml.MappingNode) and not last.flow_style:
        last = last.value[-1][1]
    place = text.index("\n", max(last.start_mark.index, last.end_mark.index - 1)) + 1
    return f"{text[:place]}{added}{text[place:]}"


def _written(value: object) -> str:
    """Format `value` as YAML in one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # also valid in YAML's double-quoted style
    written: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
    return written.removesuffix("...\n").strip()


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def _values(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the settings of an override; a section is split into its settings."""
    if is_dataclass(known_keys()[key]) and isinstance(value, dict):
        for name, inside in value.items():
            yield from _values(f"{key}.{name}", inside)
    elif isinstance(value, dict):  # a mapping with names that the schema does not list
        yield from ((f"{key}.{name}", inside) for name, inside in value.items())
    else:
        yield key, value


def _absolute(key: str, value: object) -> object:
    is_path = dict(declared_rules(PopsdConfig)).get(key) is Text.PATH
    if not (is_path and isinstance(value, str) and value) or value.startswith(PREFIX):
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value
