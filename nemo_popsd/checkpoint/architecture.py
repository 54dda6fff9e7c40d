"""Which architectures are converted, and what in a ``config.json`` Megatron-Bridge would silently compute otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

import nemo_popsd.checkpoint.olmo3  # noqa: F401  (registers the architecture)
from nemo_popsd.errors import UserError
from nemo_popsd.runtime.cpu import adapt_to_cpu

adapt_to_cpu()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge import AutoBridge  # noqa: E402

# megatron-core's constants (rotary_pos_embedding.py:106), of which Megatron-Bridge passes the factor alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Rotations whose frequencies depend on no sequence length.
_ROTATIONS = {"Olmo3ForCausalLM": ("default", "linear", "llama3", "yarn")}


def read_architecture(directory: Path, *, setting: str, trust_remote_code: bool) -> Any:
    """The transformers configuration in `directory`, once it is known that Megatron computes the same model.

    Args:
        directory: holds ``config.json``.
        setting: what an error asks the user to set.
        trust_remote_code: whether Python files in `directory` may be run; without it none is.

    Raises:
        UserError: no such directory, a configuration that cannot be read, or an architecture that is not converted.
    """
    if not (directory / "config.json").is_file():
        raise UserError(
            f"model {directory}",
            got="no config.json" if directory.is_dir() else "no such directory",
            need="a local Hugging Face model directory",
            mend=f"set {setting}",
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"model {directory}",
            got=f"a config.json that is refused: {' '.join(str(error).split())}",
            need="that of an architecture in transformers",
            mend=f"set {setting}",
        ) from None
    # Not `AutoBridge.supports`, which says yes to every name that ends in ForCausalLM.
    if not set(getattr(config, "architectures", None) or [""]) <= set(AutoBridge.list_supported_models()):
        raise UserError(
            f"model {directory}",
            got=f"architectures={getattr(config, 'architectures', None)}",
            need="one that Megatron-Bridge converts: " + ", ".join(AutoBridge.list_supported_models()),
            mend=f"set {setting}",
        )
    if difference := _difference(config):
        raise UserError(
            f"model {directory}",
            got=difference,
            need="a configuration that Megatron computes as transformers does",
            mend=f"set {setting}, or take it out of config.json if the model is to be used without it",
        )
    return config


def _difference(config: Any) -> str | None:
    """What Megatron-Bridge reads and drops, or None."""
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    architecture = config.architectures[0]
    if kind == "llama3" and architecture == "LlamaForCausalLM":
        if {name: scaling.get(name) for name in _LLAMA3} != _LLAMA3:
            return f"rope_scaling={scaling} (only the factor may differ from {_LLAMA3})"
    elif kind not in _ROTATIONS.get(architecture, ("default",)):
        return f"rope_scaling of the kind {kind!r} in {architecture}"
    if getattr(config, "attention_bias", False) and architecture == "Olmo3ForCausalLM":
        return "attention_bias=true"
    if getattr(config, "use_sliding_window", False):
        return "use_sliding_window=true"
    if getattr(config, "norm_topk_prob", True) is False:
        return "norm_topk_prob=false"
    return None
