"""The files that a checkpoint must have. Saving checks them before it writes the manifest; opening checks them too."""

from __future__ import annotations

import math
from collections.abc import Collection

from nemo_popsd.checkpoint.manifest import Manifest

CONFIG_NAME = "model_config.yaml"
"""The resolved configuration."""
ARCHITECTURE = "huggingface"
"""Folder with configuration and tokenizer of the model."""
WEIGHTS = "weights"
"""Folder of the Megatron distributed checkpoint."""
STATE = "training_state"
"""Folder of the training state, from which a run resumes."""
STATE_INDEX = "index.json"
"""File in the folder `STATE` that lists the optimizer's pieces."""
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
    """Name of the file with the state of a rank's random generators, in the folder `STATE`."""
    return f"random-{rank:05d}.safetensors"


def missing_files(names: Collection[str], *, ranks: int) -> list[str]:
    """The required files that are not among `names`.

    Args:
        names: relative names of the checkpoint's files.
        ranks: number of ranks that wrote its training state; 0 if it has none. Only a checkpoint with training state
            must have a tokenizer, since a model without one may be converted.
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


def ranks_of(manifest: Manifest) -> int:
    """Number of ranks that wrote the training state of the checkpoint that `manifest` describes; 0 if it has none."""
    if not any(name.startswith(f"{STATE}/") for name in manifest["files"]):
        return 0
    layout = manifest["layout"]
    return math.prod(int(layout[name]) for name in ("tensor", "pipeline", "context", "data"))
