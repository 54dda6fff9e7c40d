"""Reading a ``config.json``: which architecture, and whether Megatron computes what it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

import nemo_popsd.checkpoint.olmo3  # noqa: F401  (registers the architecture)
from nemo_popsd.checkpoint.families import FAMILIES
from nemo_popsd.checkpoint.rotation import UnsupportedError
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json

CONFIG = "config.json"
_CODE, _QUANTISED = "auto_map", "quantization_config"


@dataclass(frozen=True)
class Architecture:
    """What a ``config.json`` says, known to be what Megatron computes."""

    config: Any
    """The transformers configuration."""
    content: dict[str, Any]
    """Of the file, with the keys of transformers 4 added where it has only those of 5, and no names of code."""
    changed: bool
    """Whether `content` is another than that of the file."""


def read_architecture(directory: Path, *, setting: str, trust_remote_code: bool) -> Architecture:
    """What the ``config.json`` in `directory` says. Runs no code of the directory.

    Args:
        directory: holds ``config.json``.
        setting: what an error asks the user to set.
        trust_remote_code: accept a configuration that names Python files in `directory`. The architecture is that of
            the table all the same.

    Raises:
        UserError: no such directory, a configuration that cannot be read, an architecture that is not converted, or
            one that Megatron would compute otherwise; it names the key.
    """
    what = f"model {directory}"
    if not (directory / CONFIG).exists():
        raise UserError(
            what,
            got=f"no {CONFIG}" if directory.is_dir() else "no such directory",
            need="a local Hugging Face model directory",
            fix=f"set {setting}",
        )
    content: dict[str, Any] = read_strict_json(directory / CONFIG, what, fix=f"repair the file, or set {setting}")
    names = content.get("architectures")
    family = (
        FAMILIES.get(names[0]) if isinstance(names, list) and len(names) == 1 and str(names[0]) == names[0] else None
    )
    if family is None or content.get("model_type") != family.model_type:
        raise UserError(
            what,
            got=f"architectures={names}, model_type={content.get('model_type')!r}",
            need="an architecture that is converted: "
            + ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values()),
            fix=f"set {setting}",
        )
    if content.get(_QUANTISED) is not None:
        raise UserError(
            what,
            got=f"{_QUANTISED} in {CONFIG}",
            need="a model that is not quantised, since transformers would quantise what Megatron does not",
            fix=f"set {setting} to the model before quantisation, or take the key out if the weights are whole",
        )
    if _CODE in content and not trust_remote_code:
        raise UserError(
            what,
            got=f"{_CODE} in {CONFIG}, which says that Python files of the model compute it",
            need=f"a model that the code of transformers computes as {family.architecture}",
            fix="take the key out if it does, or compare both with `popsd convert --verify --trust-remote-code`",
        )
    plain = {key: value for key, value in content.items() if key != _CODE}
    try:
        config, full = family.read(plain, CONFIG_MAPPING[family.model_type].from_dict)
    except UnsupportedError as error:
        raise UserError(
            what,
            got=f"{error} in {family.architecture}",
            need="a configuration that Megatron computes as transformers does",
            fix=f"set {setting}, or take it out of {CONFIG} if the model is to be used without it",
        ) from None
    # Whatever else transformers objects to.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            what,
            got=f"a {CONFIG} that transformers refuses: {' '.join(str(error).split())}",
            need=f"that of a {family.architecture}",
            fix=f"repair the file, or set {setting}",
        ) from None
    if trust_remote_code and _CODE in content:
        config.auto_map = content[_CODE]
    return Architecture(config, full, changed=full != content)
