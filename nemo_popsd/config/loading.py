"""From a YAML file and dotted overrides to a checked `PopsdConfig`, and back to a file. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_popsd.atomic import write_text
from nemo_popsd.config.consistency import check_sections
from nemo_popsd.config.keys import accepts, is_text, known_keys, unknown_key, wrong_type
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError

_NEMO_KEYS = ("target", "nemo_version")  # What NeMo's ModelPT adds to the configuration of every model.


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PopsdConfig:
    """Read, override and check a configuration. Nothing it names (models, data, directories) need exist yet.

    Args:
        path: YAML file; keys left out have the schema's defaults.
        overrides: ``key=value`` with dotted keys, applied in order. A value is YAML (``null``, ``[a, b]``, ``1e-5``),
            except that the value of a text key is taken as it stands unless it is ``null`` or quoted.

    Raises:
        UserError: the file cannot be read, a key is unknown (the nearest known one is named), a value has the wrong
            type or is impossible, or two sections contradict each other.
    """
    merged = OmegaConf.structured(PopsdConfig)
    try:
        merged = OmegaConf.merge(merged, _read(Path(path)))
        for override in overrides:
            merged = OmegaConf.merge(merged, _parse_override(override))
        config = cast(PopsdConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # interpolations that cannot be resolved or give the wrong type
        raise UserError(
            f"configuration {path}",
            got=str(error).splitlines()[0],
            need="values that resolve to the type of their key",
            mend=f"set {error.full_key or 'the key'}",
        ) from None
    _expand_home(config)
    check_sections(config)
    return config


def _expand_home(config: PopsdConfig) -> None:
    """`~` in a path of the configuration is the home directory, here and nowhere later."""
    config.output = os.path.expanduser(config.output)
    paths = (
        (config.student, "source"),
        (config.data.train, "path"),
        (config.data.validation, "path"),
        (config.evaluation, "sets_directory"),
    )
    for section, name in paths:
        setattr(section, name, os.path.expanduser(getattr(section, name)))


def to_dict_config(config: PopsdConfig) -> DictConfig:
    """`config` as the typed OmegaConf tree that NeMo's `ModelPT` keeps."""
    return cast(DictConfig, OmegaConf.structured(config))


def from_dict_config(tree: DictConfig) -> PopsdConfig:
    """The checked configuration in `tree`, as `ModelPT` keeps it or as a checkpoint holds it.

    Raises:
        UserError: as `load_config`; a tree written by another version may hold keys that this one does not know.
    """
    keys = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    plain = {key: value for key, value in keys.items() if key not in _NEMO_KEYS}
    _check_tree(plain, lambda key: f"configuration key {key}")
    config = cast(PopsdConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PopsdConfig), plain)))
    check_sections(config)
    return config


def save_resolved(config: PopsdConfig, path: str | Path) -> None:
    """Write `config` with all its defaults as YAML; `path` holds the old or the new text at any moment, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, OmegaConf.to_yaml(to_dict_config(config)))


def _read(path: Path) -> dict[str, Any]:
    """The tree of a YAML file, its keys and types checked."""
    what = f"configuration {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            what, got=f"no readable file ({error.strerror})", need="a YAML file", mend="correct the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(what, got=f"bytes that are not UTF-8 ({error})", need="a YAML file", mend="mend it") from None
    try:
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}", got=error.problem or str(error), need="valid YAML", mend="mend it") from None
    except yaml.YAMLError as error:
        raise UserError(what, got=str(error), need="valid YAML", mend="mend it") from None
    if not isinstance(tree, dict):
        raise UserError(what, got="no keys at the top", need="a YAML mapping of keys to values", mend="mend it")
    _check_tree(tree, lambda key: f"{path}:{lines[key]}" if key in lines else what)
    return cast(dict[str, Any], tree)


def _parse_override(override: str) -> dict[str, Any]:
    """The tree of one ``key=value``, its keys and types checked."""
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(where, got="no key and value", need="key=value, as in training.steps=20", mend="rewrite it")
    if key not in known_keys():
        raise unknown_key(where, key)
    value: Any = text
    if not is_text(known_keys()[key]) or text == "null" or text[:1] in ("'", '"'):
        try:
            parsed = OmegaConf.from_dotlist([f"value={text}"])
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            raise UserError(
                where, got=f"{text!r} ({problem})", need="a YAML value", mend="correct its quotes or brackets"
            ) from None
        value = OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[call-overload,index]
    tree: dict[str, Any] = {}
    inner = tree
    *sections, leaf = key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    _check_tree(tree, lambda _: where)
    return tree


def _check_tree(tree: Mapping[Any, Any], where: Callable[[str], str], prefix: str = "") -> None:
    """Refuse the first unknown key or value of the wrong type in `tree`; `where` tells the place of a dotted key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        kind = known_keys().get(key)
        if kind is None:
            raise unknown_key(where(key), key)
        if not is_dataclass(kind):
            if not accepts(kind, value):
                raise wrong_type(where(key), key, value)
        elif isinstance(value, Mapping):
            _check_tree(value, where, f"{key}.")
        else:
            raise wrong_type(where(key), key, value)


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Line of every dotted key below `node`, counted from 1."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            lines |= _key_lines(value_node, f"{key}.")
    return lines
