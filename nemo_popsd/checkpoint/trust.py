"""Makes reading Megatron distributed checkpoints safe: no code from their files is run.

Two of their files are pickles. torch's `FileSystemReader.read_metadata` reads `.metadata` with `pickle.load`, and an
entry of it can make `DefaultLoadPlanner.load_bytes` read a file with an unrestricted `torch.load`. `common.pt` is read
with torch's weights-only unpickler unless an environment variable disables it. `safe_unpickling` prevents all three.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlan

_FORCE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_SUBCLASSES = {(_MEGATRON, "MCoreMetadata"): Metadata, (_MEGATRON, "MCoreSavePlan"): SavePlan}
"""Subclasses of megatron-core 0.15 that are read as torch's classes; their additional content is not needed."""
_RENAMED = {"pathlib._local": "pathlib"}
"""Module names that only Python 3.13 writes into pickles, with the module that has the classes in other versions."""


class RefusedPickle(pickle.UnpicklingError):
    """A pickle refers to something other than metadata of a checkpoint."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        module = _RENAMED.get(module, module)
        if (module, name) in _SUBCLASSES:
            return _SUBCLASSES[module, name]
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise RefusedPickle(
            f"its metadata refers to {module}.{name}, which is not metadata of tensors; no code was run"
        )


def load_metadata(file: IO[bytes]) -> Metadata:
    """Reads the metadata in `file`. Entries that are not tensors are left out.

    Raises:
        RefusedPickle: the pickle refers to anything but metadata.
    """
    metadata = _MetadataUnpickler(io.BytesIO(file.read())).load()
    if not isinstance(metadata, Metadata):
        raise RefusedPickle(f"its metadata is a {type(metadata).__name__}; no code was run")
    entries = metadata.state_dict_metadata
    metadata.state_dict_metadata = {k: v for k, v in entries.items() if not isinstance(v, BytesStorageMetadata)}
    return metadata


@contextmanager
def safe_unpickling() -> Iterator[None]:
    """Context in which the checkpoint readers of torch and Megatron run no code from files. Not thread-safe."""
    forced = os.environ.pop(_FORCE, None)
    original = filesystem.pickle
    filesystem.pickle = SimpleNamespace(load=load_metadata, dump=pickle.dump)  # type: ignore[assignment]
    try:
        yield
    finally:
        filesystem.pickle = original
        if forced is not None:
            os.environ[_FORCE] = forced
