"""Which weights a run began with, told from their files in a way that no layout and no split into files changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open

from nemo_popsd.checkpoint.manifest import file_digest, list_files, read_manifest
from nemo_popsd.checkpoint.safetensors_files import SafetensorsFiles

_BLOCK_ROWS = 4096


def huggingface_digest(directory: Path) -> str:
    """SHA-256 over names, types, shapes and bits of every tensor of a Hugging Face directory.

    Collective where there is a process group: the ranks share out the tensors, and one gather of objects brings the
    sums together. Every byte is read once; a few thousand rows are held at a time.
    """
    files = SafetensorsFiles(directory)
    return _shared_out(files, lambda name: _tensor_sum(directory / files.place(name), name))


def directory_digest(directory: Path) -> str:
    """SHA-256 over names and bytes of the files of a NeMo 2 checkpoint's weights. Collective where there is a process
    group, as that of a Hugging Face directory is.
    """
    return _shared_out(list_files(directory), lambda name: file_digest(directory / name)[1])


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 over the sums that a NeMo checkpoint's manifest has of its weights, and over its own base's."""
    manifest = read_manifest(directory)
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("weights/")}
    return _total([*files.items(), ("base", str(manifest["base"] and manifest["base"]["fingerprint"]))])


def _shared_out(names: Iterable[str], sum_of: Callable[[str], str]) -> str:
    """The total of the sums of all `names`, each computed by one rank."""
    together = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    mine = [(name, sum_of(name)) for name in sorted(names)[rank::ranks]]
    gathered: list[list[tuple[str, str]]] = [mine]
    if together:
        gathered = [[]] * ranks
        dist.all_gather_object(gathered, mine)
    return _total(pair for part in gathered for pair in part)


def _tensor_sum(file: Path, name: str) -> str:
    import torch

    with safe_open(file, framework="pt") as opened:
        part = opened.get_slice(name)
        shape = part.get_shape()
        total = hashlib.sha256(f"{part.get_dtype()}{shape}".encode())
        for begin in range(0, shape[0] if shape else 1, _BLOCK_ROWS):
            rows = part[begin : begin + _BLOCK_ROWS] if shape else opened.get_tensor(name)
            total.update(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _total(pairs: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {sha}" for name, sha in sorted(pairs)).encode()).hexdigest()
