"""Megatron distributed checkpoints read without running code that lies in them.

Two of their files are pickles. `.metadata` is given to `pickle.load` by torch (filesystem.py:930), and an entry of it
may say that a tensor is to be read with an unrestricted `torch.load` (default_planner.py:387); `common.pt` is read with
torch's weights-only unpickler, unless an environment variable says otherwise. `safe_unpickling` closes all three ways.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, Any

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
"""What megatron-core 0.15 derived from torch's classes; nothing of it is needed here."""


class RefusedPickle(pickle.UnpicklingError):
    """A pickle that names something other than a checkpoint's metadata."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SUBCLASSES:
            return _SUBCLASSES[module, name]
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise RefusedPickle(f"its metadata names {module}.{name}, which tensors do not need; nothing was run")


def load_metadata(file: IO[bytes]) -> Metadata:
    """The metadata in `file`, which can name nothing but metadata. Entries that are no tensors are left out.

    Raises:
        RefusedPickle: it names anything else.
    """
    metadata = _MetadataUnpickler(io.BytesIO(file.read())).load()
    if not isinstance(metadata, Metadata):
        raise RefusedPickle(f"its metadata is a {type(metadata).__name__}; nothing was run")
    entries = metadata.state_dict_metadata
    metadata.state_dict_metadata = {k: v for k, v in entries.items() if not isinstance(v, BytesStorageMetadata)}
    return metadata


@contextmanager
def safe_unpickling() -> Iterator[None]:
    """Within, torch's and Megatron's checkpoint readers run no code from the files they read."""
    forced = os.environ.pop(_FORCE, None)
    kept = filesystem.pickle
    filesystem.pickle = SimpleNamespace(load=load_metadata, dump=pickle.dump)  # type: ignore[assignment]
    try:
        yield
    finally:
        filesystem.pickle = kept
        if forced is not None:
            os.environ[_FORCE] = forced
