"""Loading a checked `PopsdConfig` from a YAML file and dotted overrides, and saving it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from nemo_popsd.config.contradictions import check_sections
from nemo_popsd.config.documents import LISTED, read_file, read_override
from nemo_popsd.config.interpolation import escaped, resolve
from nemo_popsd.config.keys import known_keys, unknown_key, wrong_type
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.values import MISSING, check_text, from_plain, is_mapping, is_text
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.settings.bounds import Text, declared_rules, hints
from nemo_popsd.settings.checks import shown

T = TypeVar("T")

_NEMO_KEYS = ("target", "nemo_version")  # NeMo's ModelPT adds these to the configuration of every model.


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PopsdConfig:
    """Read, override and check a configuration. The models, data and directories that it names need not exist.

    Args:
        path: YAML file. Omitted keys have the schema's defaults, except that `name` defaults to the file's name and
            `output` to ``runs/${name}``.
        overrides: ``key=value`` with dotted keys, applied in order. A value is YAML (``null``, ``[a, b]``, ``1e-5``),
            except that the value of a text key is literal unless it is ``null`` or quoted.

    Raises:
        UserError: the file cannot be read, a key is unknown (the message names the nearest known key) or repeated, a
            value is missing (``???``), has the wrong type or is invalid, or two sections contradict each other.
    """
    path = Path(path)
    tree = {"name": escaped(path.stem), "output": "runs/${name}", **read_file(path)}
    return load_schema(PopsdConfig, tree, overrides, what=f"configuration {path}")


def load_schema(schema: type[T], tree: Mapping[str, object], overrides: Sequence[str], *, what: str) -> T:
    """Build an instance of `schema` from `tree` (see `documents.read_file`) with `overrides` applied.

    Raises:
        UserError: as `load_config`; `what` is the name of the tree in messages.
    """
    known = known_keys(cast(type, schema))
    values = {key: value for key, value in _flat(asdict(cast(Any, schema())), known) if not is_dataclass(known[key])}
    values = {key: escaped(value) for key, value in values.items()}
    values |= dict(_flat(tree, known))
    for override in overrides:
        key, value = read_override(override, known)
        if is_mapping(known[key]) and isinstance(value, Mapping):
            given = values[key]
            value = {**(_named(key, given) if isinstance(given, list) else given), **value}
        values |= dict(_flat(value, known, f"{key}.")) if is_dataclass(known[key]) else {key: value}
    values |= {key: _named(key, values[key]) for key in LISTED if isinstance(values.get(key), list)}
    for key, value in values.items():
        if MISSING in (value if isinstance(value, list) else [value]):
            raise UserError(what, got=f"{key}={MISSING} (missing)", need="a value", fix=f"set {key}")
    resolve(values, known, what)
    rules = dict(declared_rules(schema))
    for key, value in values.items():
        rule = rules.get(key, Text.LINE)
        if isinstance(rule, Text) and isinstance(value, str):
            values[key] = check_text(key, value, rule)
        elif isinstance(rule, Text) and isinstance(value, list):
            values[key] = [check_text(key, item, rule) if isinstance(item, str) else item for item in value]
        elif isinstance(value, Mapping):
            kind = rule if isinstance(rule, Text) else Text.LINE
            values[key] = {name: check_text(f"{key}.{name}", text, kind) for name, text in value.items()}
    config = _build(schema, values)
    if isinstance(config, PopsdConfig):
        check_sections(config)
    return config


def to_dict_config(config: PopsdConfig) -> DictConfig:
    """Convert `config` to the typed OmegaConf tree that NeMo's `ModelPT` stores; strings with ``${`` stay literal."""
    return cast(DictConfig, OmegaConf.structured(escaped(config)))


def from_dict_config(tree: DictConfig) -> PopsdConfig:
    """Return the checked configuration in `tree`, as stored by `ModelPT` or in a checkpoint.

    Raises:
        UserError: as `load_config`; a tree written by another version may contain unknown keys.
    """
    plain = cast(dict[str, object], OmegaConf.to_container(tree, resolve=True))
    values = dict(_flat(asdict(PopsdConfig()), known_keys()))
    for key, value in _flat({key: value for key, value in plain.items() if key not in _NEMO_KEYS}, known_keys()):
        where, hint = f"configuration key {key}", known_keys().get(key)
        if hint is None:
            raise unknown_key(where, key)
        if isinstance(value, bool) and is_text(hint):  # written by a version in which the setting was a Boolean
            value = str(value).lower()
        try:
            values[key] = from_plain(hint, value)
        except ValueError:
            raise wrong_type(where, key, hint, f"{key}={shown(value)}") from None
    config = _build(PopsdConfig, values)
    check_sections(config)
    return config


def by_key(config: PopsdConfig) -> dict[str, object]:
    """Return the values of `config` by dotted name of the setting."""
    known = known_keys()
    return {key: value for key, value in _flat(asdict(config), known) if not is_dataclass(known[key])}


def save_resolved(config: PopsdConfig, path: str | Path) -> None:
    """Write `config` with all its defaults as YAML, atomically: `path` always has either the old or the new text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, OmegaConf.to_yaml(to_dict_config(config)))


def _flat(tree: Mapping[str, object], known: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values of the leaves of `tree`, including unknown keys and values in place of a section."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and is_dataclass(known.get(key)):
            yield from _flat(value, known, f"{key}.")
        else:
            yield key, value


def _named(key: str, names: list[str]) -> dict[str, str]:
    """Return the mapping that a list of names abbreviates."""
    if len(set(names)) < len(names):
        raise UserError("configuration", got=f"{key}={shown(names)}", need="each name once", fix=f"set {key}")
    return dict.fromkeys(names, "")


def _build(schema: type[T], values: Mapping[str, object], prefix: str = "") -> T:
    """Build an instance of the dataclass `schema` with its nested sections; each section checks its own values."""
    arguments: dict[str, object] = {}
    for name, hint in hints(cast(type, schema)).items():
        key = prefix + name
        arguments[name] = _build(cast(type, hint), values, f"{key}.") if is_dataclass(hint) else values[key]
    return schema(**arguments)
