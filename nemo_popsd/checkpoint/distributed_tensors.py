"""Distributed checkpoints of torch as what they are on disk: named tensors in pieces, read and written one at a time.

Nothing here needs a model, a process group, or the memory of more than one tensor, and reading runs no code: of the
index see `nemo_popsd.checkpoint.trust`, and the tensors are loaded as weights only.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlanner, save
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nemo_popsd.checkpoint.trust import load_metadata
from nemo_popsd.errors import UserError

_INDEX = ".metadata"


def _read_index(directory: Path) -> Metadata:
    try:
        with (directory / _INDEX).open("rb") as file:
            return load_metadata(file)
    except FileNotFoundError:
        raise _unusable(directory, f"no {_INDEX}") from None
    # A damaged pickle raises whatever its opcodes happen to do.
    except Exception as error:
        raise _unusable(directory, f"{_INDEX} that is refused: {error}") from None


class DistributedTensors:
    """The tensors of one distributed checkpoint, read piece by piece.

    Attributes:
        directory: where it lies.
        shapes: whole shape of each tensor, by key; objects that are no tensors are left out.
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads the index, no tensors.

        Raises:
            UserError: there is no index, it is damaged, or it names anything but descriptions of tensors.
        """
        self.directory = Path(directory)
        self._index = _read_index(self.directory)
        self._tensors = {
            key: entry
            for key, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {key: entry.size for key, entry in self._tensors.items()}

    def dtypes(self, prefix: str) -> set[torch.dtype]:
        """Those of the tensors whose keys begin with `prefix`."""
        return {entry.properties.dtype for key, entry in self._tensors.items() if key.startswith(prefix)}

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor."""
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def read(self, key: str, *position: int) -> Tensor:
        """One tensor, or the part of it at `position` along its first dimensions (a layer, an expert).

        Args:
            key: one of `shapes`.
            position: index along the first dimensions, which the result does not have.

        Raises:
            UserError: a file is missing or damaged, or the pieces do not make up the whole.
        """
        entry = self._tensors[key]
        shape = entry.size[len(position) :]
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        missing = whole.numel()
        for chunk in entry.chunks:
            fixed = list(zip(position, chunk.offsets, chunk.sizes, strict=False))
            if any(not offset <= place < offset + size for place, offset, size in fixed):
                continue
            piece = self._read_chunk(key, chunk)[tuple(place - offset for place, offset, _ in fixed)]
            offsets = chunk.offsets[len(position) :]
            target = whole[tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))]
            target.copy_(piece)
            missing -= piece.numel()
        if missing:
            raise _unusable(self.directory, f"pieces of {key} that leave {missing} of {whole.numel()} numbers open")
        return whole

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._index.storage_data.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise _unusable(self.directory, f"an index that says nowhere in which file a piece of {key} is")
        path = self.directory / place.relative_path
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise _unusable(self.directory, f"an index that points outside, to {place.relative_path}")
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                tensor: Any = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        # A file that was cut or changed raises whatever its zip archive and its pickle happen to do.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise _unusable(self.directory, f"{path.name}, from which {key} cannot be read ({reason})") from None
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise _unusable(self.directory, f"{path.name} with another {key} than the index says")
        return tensor


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is computed when it is written."""

    key: str
    """Of the whole tensor."""
    position: tuple[int, ...]
    """Of this part along the first dimensions of the whole; () is all of it."""
    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    """Of the whole."""
    make: Callable[[], Tensor]
    """Computes the part, without the dimensions that `position` fixes."""

    @property
    def _chunk(self) -> ChunkStorageMetadata:
        inner = self.shape[len(self.position) :]
        return ChunkStorageMetadata(
            offsets=torch.Size([*self.position, *(0 for _ in inner)]),
            sizes=torch.Size([*(1 for _ in self.position), *inner]),
        )

    @property
    def bytes(self) -> int:
        """Of this part, as it is written."""
        return math.prod(self.shape[len(self.position) :]) * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        """What torch's writer wants to know before it asks for the numbers."""
        chunk = self._chunk
        return WriteItem(
            index=MetadataIndex(self.key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=torch.Size(self.shape)
            ),
        )

    def tensor(self) -> Tensor:
        """The numbers, with every dimension of the whole."""
        chunk, made = self._chunk, self.make()
        assert made.shape == tuple(self.shape[len(self.position) :]), (self.key, made.shape, self.shape)
        return made.to(self.dtype).reshape(chunk.sizes)


class _OneByOne(SavePlanner):
    """Lets torch's writer ask for one piece after the other."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {item.index: (piece, item) for piece in pieces for item in [piece.write_item()]}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """There is no state besides the pieces."""

    def create_local_plan(self) -> SavePlan:
        """Every piece, in order."""
        return SavePlan([item for _, item in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The index of a single writer."""
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Computes one piece; the writer lets go of it before it asks for the next."""
        return self._pieces[write_item.index][0].tensor()


def write_distributed_tensors(directory: Path, pieces: Sequence[Piece]) -> None:
    """Writes a checkpoint that megatron-core loads in any layout, from this process alone.

    Args:
        directory: must exist and be empty.
        pieces: of all tensors; the parts of one key cover it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")  # As intended.
        save({}, storage_writer=FileSystemWriter(directory), planner=_OneByOne(pieces), no_dist=True)
    # What megatron-core asks for besides: which format it is (dist_checkpointing/core.py), and the state that is alike
    # on all ranks, of which there is none.
    format_ = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(format_))
    torch.save({}, directory / "common.pt")


def _unusable(directory: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {directory}",
        got=got,
        need="a distributed checkpoint of tensors, complete and undamaged",
        fix="give another checkpoint",
    )
