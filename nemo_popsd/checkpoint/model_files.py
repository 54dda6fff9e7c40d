"""Reads the names of the tensors in a Hugging Face directory, checked for completeness, and its other files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from nemo_popsd.checkpoint.architecture import CONFIG
from nemo_popsd.checkpoint.completeness import require_complete
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles
from nemo_popsd.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES, for_transformers_4
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json, unreadable

TENSOR_NAMES = "tensor_names.json"
"""File that lists the tensors of a directory without weights."""
GENERATION = "generation_config.json"
ARTIFACTS = (CONFIG, GENERATION, *TOKENIZER_FILES)
"""The files besides the weights that are copied into checkpoints and exports."""
_ADAPTER = "adapter_config.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_tensor_names(
    directory: Path, config: PretrainedConfig, open_files: Callable[[], SafetensorsFiles], *, setting: str
) -> list[str]:
    """The sorted names of the tensors, after a check that they are those of the architecture.

    Args:
        directory: contains weights, or `TENSOR_NAMES` without weights.
        config: the transformers configuration.
        open_files: opens the weights.
        setting: the setting that an error message names.

    Raises:
        UserError: raised by `open_files` or `require_complete`; or the list is damaged, there is an adapter next to the
            weights, or the output matrix contradicts the configuration.
    """
    what, fix = f"model {directory}", f"download the files again, or set {setting}"
    listed = directory / TENSOR_NAMES
    if (listed.exists() or listed.is_symlink()) and not any(directory.glob("*.safetensors")):
        names: list[str] = read_strict_json(listed, what, fix=fix, kind=list)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise UserError(
                what, got=f"{TENSOR_NAMES} that is not a list of unique names", need="a list of names", fix=fix
            )
        require_complete(what, config, dict.fromkeys(names), files={}, fix=fix)
        return sorted(names)
    files = open_files()
    if (directory / _ADAPTER).exists():
        raise UserError(
            what,
            got=f"{_ADAPTER} beside the weights, which makes transformers load an adapter",
            need="a model without adapter files",
            fix="merge the adapter into the model, or move its files to another directory",
        )
    shapes = {name: files.shape(name) for name in files}
    require_complete(what, config, shapes, files={name: files.file_of(name) for name in files}, fix=fix)
    if config.tie_word_embeddings and _HEAD in files and not _equal(files, _HEAD, _EMBEDDING):
        raise UserError(
            what,
            got=f"tie_word_embeddings=true and a {_HEAD} that differs from the embedding",
            need="an output matrix that is the embedding",
            fix=f"set tie_word_embeddings=false in {CONFIG}, or remove {_HEAD}",
        )
    return sorted(files)


def read_artifacts(directory: Path, *, setting: str) -> dict[str, bytes]:
    """Content of the files in `ARTIFACTS` that exist, by name, in a form that transformers 4 and 5 both read.

    Args:
        directory: directory of the model.
        setting: the setting that an error message names.

    Raises:
        UserError: a file cannot be read.
    """
    what, artifacts = f"model {directory}", {}
    for name in ARTIFACTS:
        file = directory / name
        if file.exists() or file.is_symlink():
            if reason := unreadable(file):
                raise UserError(
                    what,
                    got=f"{name}, which {reason}",
                    need="a readable regular file",
                    fix=f"download it again, or set {setting}",
                )
            artifacts[name] = file.read_bytes()
    if TOKENIZER_CONFIG in artifacts:
        content = read_strict_json(directory / TOKENIZER_CONFIG, what, fix="repair the file")
        translated = for_transformers_4(content, what)
        if translated != content:
            artifacts[TOKENIZER_CONFIG] = (json.dumps(translated, indent=2, ensure_ascii=False) + "\n").encode()
    return artifacts


def _equal(files: SafetensorsFiles, name: str, other: str) -> bool:
    first, second = files[name], files[other]
    return first.dtype == second.dtype and torch.equal(first, second)
