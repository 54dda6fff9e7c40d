"""What a checkpoint must hold: saving checks it before the manifest is written, and opening checks it again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

CONFIG_NAME = "model_config.yaml"
"""The resolved configuration."""
ARCHITECTURE = "huggingface"
"""Folder with configuration and tokenizer of the model."""
WEIGHTS = "weights"
"""Folder of the Megatron distributed checkpoint."""
STATE = "training_state"
"""Folder of what a run resumes from."""
STATE_INDEX = "index.json"
"""Lists the optimizer's pieces in that folder."""
_ALWAYS = (
    CONFIG_NAME,
    f"{ARCHITECTURE}/config.json",
    f"{ARCHITECTURE}/tensor_names.json",
    f"{WEIGHTS}/.metadata",
    f"{WEIGHTS}/metadata.json",
    f"{WEIGHTS}/common.pt",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def random_file(rank: int) -> str:
    """Name of the file with the generators of a rank, in the folder of the training state."""
    return f"random-{rank:05d}.safetensors"


def missing_files(names: Collection[str], *, ranks: int) -> list[str]:
    """What a checkpoint with the files `names` lacks.

    Args:
        names: of its files, relative.
        ranks: how many wrote its training state; 0 for a checkpoint without one, which a conversion of a model without
            a tokenizer may be.
    """
    missing = [name for name in _ALWAYS if name not in names]
    if not any(name.startswith(f"{WEIGHTS}/") and name.endswith(".distcp") for name in names):
        missing.append(f"{WEIGHTS}/*.distcp")
    if ranks:
        state = [STATE_INDEX, *map(random_file, range(ranks))]
        missing += [name for name in (f"{STATE}/{name}" for name in state) if name not in names]
        if not any(f"{ARCHITECTURE}/{name}" in names for name in _VOCABULARIES):
            missing.append(f"{ARCHITECTURE}/{_VOCABULARIES[0]}")
    return missing


def ranks_of(manifest: Mapping[str, Any]) -> int:
    """How many ranks wrote the training state of the checkpoint that `manifest` describes; 0 without one."""
    if not any(name.startswith(f"{STATE}/") for name in manifest["files"]):
        return 0
    layout = manifest["layout"]
    return math.prod(int(layout[name]) for name in ("tensor", "pipeline", "context", "data"))
