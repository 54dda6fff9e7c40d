"""What a Hugging Face directory holds: the names of its tensors, known to be complete, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_popsd.checkpoint.architecture import CONFIG
from nemo_popsd.checkpoint.completeness import require_complete
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles
from nemo_popsd.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES, for_transformers_4
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json, unreadable

TENSOR_NAMES = "tensor_names.json"
"""Lists the tensors of a directory whose weights lie elsewhere."""
GENERATION = "generation_config.json"
ARTIFACTS = (CONFIG, GENERATION, *TOKENIZER_FILES)
"""What a model consists of besides its weights. Nothing else is carried into a checkpoint or an export."""
_ADAPTER = "adapter_config.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_tensor_names(
    directory: Path, config: Any, open_files: Callable[[], SafetensorsFiles], *, setting: str
) -> list[str]:
    """The names of the tensors, sorted, once it is known that they are those of the architecture.

    Args:
        directory: holds weights, or `TENSOR_NAMES` alone.
        config: the transformers configuration.
        open_files: opens the weights.
        setting: what an error asks the user to set.

    Raises:
        UserError: from `open_files` and `require_complete`; or a list that is damaged, an adapter beside the weights,
            or an output matrix that contradicts the configuration.
    """
    what, fix = f"model {directory}", f"fetch the files again, or set {setting}"
    listed = directory / TENSOR_NAMES
    if (listed.exists() or listed.is_symlink()) and not any(directory.glob("*.safetensors")):
        names: list[str] = read_strict_json(listed, what, fix=fix, kind=list)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise UserError(what, got=f"{TENSOR_NAMES} that is no list of names", need="names, each once", fix=fix)
        require_complete(what, config, dict.fromkeys(names), places={}, fix=fix)
        return sorted(names)
    files = open_files()
    if (directory / _ADAPTER).exists():
        raise UserError(
            what,
            got=f"{_ADAPTER} beside the weights, so that transformers loads an adapter",
            need="a whole model",
            fix="merge the adapter into the model, or move its files elsewhere",
        )
    places = {name: files.place(name) for name in files}
    require_complete(what, config, {name: files.shape(name) for name in files}, places=places, fix=fix)
    if config.tie_word_embeddings and _HEAD in files and not _equal(files, _HEAD, _EMBEDDING):
        raise UserError(
            what,
            got=f"tie_word_embeddings=true and a {_HEAD} that is not the embedding",
            need="one output matrix",
            fix=f"set tie_word_embeddings=false in {CONFIG}, or remove {_HEAD}, whichever is meant",
        )
    return sorted(files)


def read_artifacts(directory: Path, *, setting: str) -> dict[str, bytes]:
    """Content of the files in `ARTIFACTS` that are there, by name, as transformers 4 and 5 both read them.

    Args:
        directory: of the model.
        setting: what an error asks the user to set.

    Raises:
        UserError: one of them cannot be read.
    """
    what, artifacts = f"model {directory}", {}
    for name in ARTIFACTS:
        file = directory / name
        if file.exists() or file.is_symlink():
            if reason := unreadable(file):
                raise UserError(
                    what,
                    got=f"{name}, which {reason}",
                    need="the plain files of a model",
                    fix=f"fetch it again, or set {setting}",
                )
            artifacts[name] = file.read_bytes()
    if TOKENIZER_CONFIG in artifacts:
        content = read_strict_json(directory / TOKENIZER_CONFIG, what, fix="repair the file")
        translated = for_transformers_4(content, what)
        if translated != content:
            artifacts[TOKENIZER_CONFIG] = (json.dumps(translated, indent=2, ensure_ascii=False) + "\n").encode()
    return artifacts


def _equal(files: SafetensorsFiles, one: str, other: str) -> bool:
    first, second = files[one], files[other]
    return first.dtype == second.dtype and torch.equal(first, second)
