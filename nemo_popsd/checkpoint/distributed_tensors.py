"""Reads and writes torch's distributed checkpoints tensor by tensor, as named tensors that are stored in chunks.

Needs no model, no process group, and the memory of one tensor. Reading runs no code from the files: the index is read
by `nemo_popsd.checkpoint.trust`, and the tensors with torch's weights-only unpickler.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise _unusable(directory, f"an unreadable {_INDEX} ({error})") from None


class DistributedTensors:
    """The tensors of one distributed checkpoint, read chunk by chunk.

    Attributes:
        directory: the checkpoint.
        shapes: full shape of each tensor by key; stored objects that are not tensors are left out.
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads the index only.

        Raises:
            UserError: the index is missing or damaged, or names anything but metadata of tensors.
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
        """Data types of the tensors whose keys start with `prefix`."""
        return {entry.properties.dtype for key, entry in self._tensors.items() if key.startswith(prefix)}

    def dtype(self, key: str) -> torch.dtype:
        """Data type of one tensor."""
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def read(self, key: str, *position: int) -> Tensor:
        """Reads one tensor, or the part of it at `position` along its first dimensions (a layer, an expert).

        Args:
            key: one of `shapes`.
            position: index along each of the first dimensions; the result does not have these dimensions.

        Raises:
            UserError: a file is missing or damaged, or the chunks do not cover the tensor.
        """
        entry = self._tensors[key]
        shape = entry.size[len(position) :]
        tensor = torch.empty(shape, dtype=entry.properties.dtype)
        missing = tensor.numel()
        for chunk in entry.chunks:
            fixed = list(zip(position, chunk.offsets, chunk.sizes, strict=False))
            if any(not offset <= index < offset + size for index, offset, size in fixed):
                continue
            part = self._read_chunk(key, chunk)[tuple(index - offset for index, offset, _ in fixed)]
            offsets = chunk.offsets[len(position) :]
            target = tensor[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))]
            target.copy_(part)
            missing -= part.numel()
        if missing:
            raise _unusable(self.directory, f"chunks of {key} without {missing} of its {tensor.numel()} elements")
        return tensor

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        location = self._index.storage_data.get(MetadataIndex(key, chunk.offsets))
        if location is None:
            raise _unusable(self.directory, f"an index that names no file for a chunk of {key}")
        path = self.directory / location.relative_path
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise _unusable(
                self.directory, f"an index that names the file {location.relative_path} outside the directory"
            )
        try:
            with path.open("rb") as file:
                file.seek(location.offset)
                tensor: object = torch.load(
                    io.BytesIO(file.read(location.length)), map_location="cpu", weights_only=True
                )
        # A truncated or changed file can raise any exception of the zip reader or the unpickler.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise _unusable(self.directory, f"{path.name}, from which {key} cannot be read ({reason})") from None
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise _unusable(self.directory, f"{path.name}, in which the shape of {key} differs from the index")
        return tensor


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is computed when it is written."""

    key: str
    """Key of the tensor."""
    position: tuple[int, ...]
    """Index of the part along the first dimensions of the tensor; () is the full tensor."""
    shape: tuple[int, ...]
    """Full shape of the tensor."""
    dtype: torch.dtype
    """Data type of the tensor."""
    make: Callable[[], Tensor]
    """Computes the part, without the dimensions that `position` indexes."""

    @property
    def _chunk(self) -> ChunkStorageMetadata:
        inner = self.shape[len(self.position) :]
        return ChunkStorageMetadata(
            offsets=torch.Size([*self.position, *(0 for _ in inner)]),
            sizes=torch.Size([*(1 for _ in self.position), *inner]),
        )

    @property
    def bytes(self) -> int:
        """Size of this part in the file."""
        return math.prod(self.shape[len(self.position) :]) * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        """Description of this part for torch's writer, without data."""
        chunk = self._chunk
        return WriteItem(
            index=MetadataIndex(self.key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=torch.Size(self.shape)
            ),
        )

    def tensor(self) -> Tensor:
        """Computes this part, with all dimensions of the tensor."""
        chunk, part = self._chunk, self.make()
        assert part.shape == tuple(self.shape[len(self.position) :]), (self.key, part.shape, self.shape)
        return part.to(self.dtype).reshape(chunk.sizes)


class _OneByOne(SavePlanner):
    """Save planner that computes each piece when torch's writer requests its data."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {item.index: (piece, item) for piece in pieces for item in [piece.write_item()]}

    def set_up_planner(self, state_dict: object, storage_meta: object = None, is_coordinator: bool = False) -> None:
        """Does nothing: only the pieces are saved."""

    def create_local_plan(self) -> SavePlan:
        """A plan with every piece, in order."""
        return SavePlan([item for _, item in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The metadata, for a single writer."""
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns the plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Computes one piece. The writer releases it before it requests the next."""
        return self._pieces[write_item.index][0].tensor()


def write_distributed_tensors(directory: Path, pieces: Sequence[Piece]) -> None:
    """Writes a checkpoint that megatron-core loads in any layout. Runs on this process only.

    Args:
        directory: must exist and be empty.
        pieces: pieces of all tensors; those of one key cover its tensor.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")  # One process writes on purpose.
        save({}, storage_writer=FileSystemWriter(directory), planner=_OneByOne(pieces), no_dist=True)
    # megatron-core also needs a description of the format (`CheckpointingConfig` in dist_checkpointing) and the state
    # that is the same on all ranks, which is empty here.
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(config))
    torch.save({}, directory / "common.pt")


def _unusable(directory: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {directory}",
        got=got,
        need="a distributed checkpoint of tensors, complete and undamaged",
        fix="use another checkpoint",
    )
