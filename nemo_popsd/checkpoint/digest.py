"""Digests of the initial weights of a run, independent of its layout. The digest of a Hugging Face directory is also
independent of the split into files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from nemo_popsd.checkpoint.manifest import file_digest, list_files, read_manifest
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles

_BLOCK_LENGTH = 4096
"""Extent along the first dimension of the blocks in which a tensor is read."""


def huggingface_digest(directory: Path) -> str:
    """SHA-256 over names, types, shapes and bits of every tensor of a Hugging Face directory.

    Collective if there is a process group: each rank reads a share of the tensors, and one gather of objects collects
    their digests. Every byte is read once; no complete tensor is held in memory.
    """
    files = SafetensorsFiles(directory)
    return _combined_over_ranks(files, lambda name: _tensor_digest(directory / files.file_of(name), name))


def directory_digest(directory: Path) -> str:
    """SHA-256 over names and bytes of the files in a directory (weights of a NeMo 2 checkpoint). Collective if there is
    a process group, like `huggingface_digest`.
    """
    return _combined_over_ranks(list_files(directory), lambda name: file_digest(directory / name)[1])


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 over the digests of the weight files and of the base in a NeMo checkpoint's manifest."""
    manifest = read_manifest(directory)
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("weights/")}
    return _combined([*files.items(), ("base", str(manifest["base"] and manifest["base"]["fingerprint"]))])


def _combined_over_ranks(names: Iterable[str], digest_of: Callable[[str], str]) -> str:
    """The combined digest of all `names`; one rank computes the digest of each."""
    distributed = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    share = [(name, digest_of(name)) for name in sorted(names)[rank::ranks]]
    gathered: list[list[tuple[str, str]]] = [share]
    if distributed:
        gathered = [[]] * ranks
        dist.all_gather_object(gathered, share)
    return _combined(pair for part in gathered for pair in part)


def _tensor_digest(file: Path, name: str) -> str:
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_slice(name)
        shape = tensor.get_shape()
        digest = hashlib.sha256(f"{tensor.get_dtype()}{shape}".encode())
        for start in range(0, shape[0] if shape else 1, _BLOCK_LENGTH):
            block = tensor[start : start + _BLOCK_LENGTH] if shape else opened.get_tensor(name)
            digest.update(block.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _combined(pairs: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {sha}" for name, sha in sorted(pairs)).encode()).hexdigest()
