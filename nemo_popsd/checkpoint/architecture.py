"""Reads a ``config.json``, and refuses a configuration that Megatron computes differently from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, PretrainedConfig

import nemo_popsd.checkpoint.olmo3
import nemo_popsd.checkpoint.smollm3  # noqa: F401  (both register an architecture)
from nemo_popsd.checkpoint.model_families import FAMILIES
from nemo_popsd.checkpoint.refusals import MISSING
from nemo_popsd.checkpoint.rotation import UnsupportedError
from nemo_popsd.compat.transformers import configuration_errors
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json

CONFIG = "config.json"
_CODE, _QUANTISED = "auto_map", "quantization_config"


@dataclass(frozen=True)
class Architecture:
    """Content of a ``config.json`` that Megatron computes as transformers does."""

    config: PretrainedConfig
    """The transformers configuration."""
    content: dict[str, object]
    """Content of the file without names of Python code. Keys of transformers 4 are added if the file has only those of
    transformers 5."""
    changed: bool
    """Whether `content` differs from that of the file."""


def read_architecture(directory: Path, *, setting: str, trust_remote_code: bool) -> Architecture:
    """Reads the ``config.json`` in `directory`. Runs no code of the directory.

    Args:
        directory: holds ``config.json``.
        setting: the setting that an error message names.
        trust_remote_code: accept a configuration that names Python files in `directory`. The architecture is
            still looked up in `FAMILIES`.

    Raises:
        UserError: the directory does not exist, the configuration cannot be read, the architecture is not supported,
            or Megatron would compute it differently; the message names the key.
    """
    what = f"model {directory}"
    if not (directory / CONFIG).exists():
        raise UserError(
            what,
            got=f"no {CONFIG}" if directory.is_dir() else "no such directory",
            need="a local Hugging Face model directory",
            fix=f"set {setting}",
        )
    content: dict[str, object] = read_strict_json(directory / CONFIG, what, fix=f"repair the file, or set {setting}")
    names = content.get("architectures")
    family = (
        FAMILIES.get(names[0]) if isinstance(names, list) and len(names) == 1 and str(names[0]) == names[0] else None
    )
    model_type = content.get("model_type")
    if family is None or model_type != family.model_type:
        missing = MISSING.get(model_type) if isinstance(model_type, str) else None
        raise UserError(
            what,
            got=f"architectures={names}, model_type={model_type!r}"
            + (f", which is not supported: {missing}" if missing else ""),
            need="a supported architecture: "
            + ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values()),
            fix=f"set {setting}",
        )
    if content.get(_QUANTISED) is not None:
        raise UserError(
            what,
            got=f"{_QUANTISED} in {CONFIG}",
            need="a model that is not quantised, since Megatron would load it without quantisation",
            fix=f"set {setting} to the model before quantisation, or remove the key if the weights are not quantised",
        )
    if _CODE in content and not trust_remote_code:
        raise UserError(
            what,
            got=f"{_CODE} in {CONFIG}: the model is defined by Python files of its own",
            need=f"a model that the {family.architecture} of transformers computes",
            fix="remove the key if it does, or compare both with `popsd convert --verify --trust-remote-code`",
        )
    plain = {key: value for key, value in content.items() if key != _CODE}
    try:
        config, full = family.read(plain, CONFIG_MAPPING[family.model_type].from_dict)
    except UnsupportedError as error:
        raise UserError(
            what,
            got=f"{error} in {family.architecture}",
            need="a configuration that Megatron computes as transformers does",
            fix=f"set {setting} to another model, or remove the key from {CONFIG} to use the model without it",
        ) from None
    except configuration_errors() as error:
        raise UserError(
            what,
            got=f"a {CONFIG} that transformers rejects: {' '.join(str(error).split())}",
            need=f"a valid configuration of {family.architecture}",
            fix=f"repair the file, or set {setting}",
        ) from None
    if trust_remote_code and _CODE in content:
        config.auto_map = content[_CODE]
    return Architecture(config, full, changed=full != content)
