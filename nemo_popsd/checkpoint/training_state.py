"""Saves and loads the optimizer state, second sets of the trained weights, and the random state of each rank.

The optimizer state and the second sets are stored in pieces that any layout can read.

    training_state/index.json               Adam's step count; file, offset and shape of every piece
    training_state/rank-00000.safetensors   pieces that rank 0 wrote
    training_state/random-00000.safetensors random generators of rank 0

A piece is a box within the unsharded tensor; its offset follows from Megatron's sharding of the weights. Ranks with the
same shards divide the parameters among them, so that each writes about the same number of bytes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemo_popsd.checkpoint.contents import STATE, STATE_INDEX, random_file
from nemo_popsd.checkpoint.manifest import damaged
from nemo_popsd.files.atomic import flush_file
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.optimizer_state import ParameterState, parameter_states, set_step_count, step_count
from nemo_popsd.runtime.random_state import restore_random_state

_READ_ERRORS = (OSError, KeyError, ValueError, TypeError, SafetensorError)


Copies: TypeAlias = Mapping[str, Mapping[nn.Parameter, Tensor]]
"""By name: fp32 values by trained parameter, each with the shape of this rank's shard."""


class _StoredPiece(TypedDict):
    """Entry of the index for one piece."""

    tensor: str
    """Key of the unsharded tensor."""
    file: str
    key: str
    """Name of the piece in the file."""
    offset: Sequence[int]
    shape: Sequence[int]
    whole: Sequence[int]
    """Shape of the unsharded tensor."""


class StagedState:
    """The optimizer and random state in host memory, ready to be written.

    Attributes:
        files: files that `write` writes.
        bytes: size of the tensors.
        names_of_all_ranks: names of the files that all ranks write.
    """

    def __init__(
        self,
        models: Sequence[ModelChunk],
        optimizer: MegatronOptimizer,
        directory: Path,
        *,
        copies: Copies | None = None,
        random_state: Mapping[str, Tensor],
        copy: bool = False,
    ) -> None:
        """Copies the state to host memory. Collective: one gather of names, and with the distributed optimizer one
        reduction per parameter and state.

        Args:
            models: this rank's chunks of the model, without wrappers.
            optimizer: Megatron's optimizer.
            directory: the checkpoint; its folder `STATE` must exist.
            copies: second sets of the trained weights.
            random_state: state of this rank's random generators.
            copy: whether copies are written, so that training can continue during the write.
        """
        self._random = dict(random_state)
        self._tensors: dict[str, Tensor] = {}
        rank = dist.get_rank()
        self._folder = directory / STATE
        file = f"rank-{rank:05d}.safetensors"
        pieces: list[_StoredPiece] = []
        for state, sharding, owner in owned_states(models, optimizer):
            second = {name: values[state.parameter] for name, values in (copies or {}).items()}
            for name in (*state.names, *second):
                kept = second.get(name, state.values.get(name))
                if name not in second:
                    tensor = state.gathered(name, owner)
                else:
                    tensor = kept if state.group.rank() == owner else None
                if tensor is None or not written_by_this_shard(sharding):
                    continue
                for piece in _pieces(sharding, tensor, name):
                    box = _Box.of(piece)
                    key = f"{piece.key}@{'_'.join(map(str, box.offset))}"
                    self._tensors[key] = _on_host(piece.data, kept if copy else None)
                    pieces.append(
                        {
                            "tensor": piece.key,
                            "file": file,
                            "key": key,
                            "offset": box.offset,
                            "shape": box.shape,
                            "whole": tuple(piece.global_shape),
                        }
                    )
        gathered: list[list[_StoredPiece]] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, pieces)
        all_pieces = [piece for part in gathered for piece in part]
        self._index = {"step_count": step_count(optimizer), "pieces": all_pieces}
        self.names_of_all_ranks = {piece["file"] for piece in all_pieces} | set(map(random_file, range(len(gathered))))
        self._files = {self._folder / random_file(rank): self._random}
        if self._tensors:
            self._files[self._folder / file] = self._tensors
        self.files = list(self._files)
        self.bytes = sum(t.numel() * t.element_size() for tensors in self._files.values() for t in tensors.values())

    def write(self) -> None:
        """Writes and flushes this rank's files. May run in another thread.

        Raises:
            OSError: the file system failed.
        """
        for path, tensors in self._files.items():
            try:
                save_file(tensors, path)
            except SafetensorError as error:  # it wraps errors of the system
                raise OSError(f"{path.name}: {error}") from error
            path.chmod(0o644)
            flush_file(path)
        self._files = {}

    def finish(self) -> None:
        """Writes the index. Called on rank 0 only."""
        (self._folder / STATE_INDEX).write_text(json.dumps(self._index))


def owned_states(
    models: Sequence[ModelChunk], optimizer: MegatronOptimizer
) -> Iterator[tuple[ParameterState, Sharding, int]]:
    """For every trained parameter: its state, its shard of the full tensor, and the rank of its group that writes it.

    Args:
        models: this rank's chunks of the model, without wrappers.
        optimizer: Megatron's optimizer.
    """
    states = list(_with_sharding(models, optimizer))
    owners = _owners([(state.parameter.numel(), state.group) for state, _ in states])
    for (state, sharding), owner in zip(states, owners, strict=True):
        yield state, sharding, owner


def _owners(parameters: Sequence[tuple[int, dist.ProcessGroup]]) -> list[int]:
    """The rank that writes each parameter, the same result on all ranks of its group.

    Parameters are assigned by decreasing size, each to the first rank with the fewest elements so far.

    Args:
        parameters: number of elements, and the ranks with the same shard, of each parameter.
    """
    owners = [0] * len(parameters)
    loads: dict[dist.ProcessGroup, list[int]] = {}
    for position in sorted(range(len(parameters)), key=lambda index: -parameters[index][0]):
        elements, group = parameters[position]
        load = loads.setdefault(group, [0] * group.size())
        owners[position] = load.index(min(load))
        load[owners[position]] += elements
    return owners


def _on_host(data: Tensor, kept: Tensor | None) -> Tensor:
    """`data` in host memory, contiguous. It is copied if it is on a device, or if it shares memory with `kept`, which
    the next step changes.
    """
    host = data.detach().cpu().contiguous()
    same = kept is not None and host.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    return host.clone() if same else host


def load_training_state(
    directory: Path, models: Sequence[ModelChunk], optimizer: MegatronOptimizer, copies: Copies | None = None
) -> int:
    """Loads the optimizer state, written by any layout, and returns Adam's step count. No collectives.

    The weights of the model must be loaded. Needs memory for the state of one parameter in addition to the optimizer.

    Args:
        directory: the checkpoint.
        models: this rank's chunks of the model, without wrappers.
        optimizer: Megatron's optimizer.
        copies: second sets of the trained weights, which are filled in place.

    Raises:
        DamagedCheckpointError: a piece is missing or has another shape.
    """
    folder = directory / STATE
    try:
        index = json.loads((folder / STATE_INDEX).read_text())
        reader = _Reader(folder, index["pieces"])
        for state, sharding in _with_sharding(models, optimizer):
            for name, part in state.values.items():
                tensor = torch.zeros(state.parameter.shape, dtype=torch.float32)
                for piece in _pieces(sharding, tensor, name):
                    reader.fill(piece)
                state.set(name, tensor.view(-1)[state.begin : state.begin + part.numel()])
            for name, values in (copies or {}).items():
                tensor = torch.zeros(state.parameter.shape, dtype=torch.float32)
                for piece in _pieces(sharding, tensor, name):
                    reader.fill(piece)
                values[state.parameter].copy_(tensor)
        reader.close()
    except _READ_ERRORS as error:
        raise damaged(directory, f"an unreadable {STATE} ({error})") from error
    set_step_count(optimizer, index["step_count"])
    return int(index["step_count"])


def load_random_state(directory: Path) -> None:
    """Restores this rank's random generators; valid only in the layout that wrote the checkpoint.

    Raises:
        DamagedCheckpointError: this rank's file cannot be read.
    """
    try:
        restore_random_state(load_file(directory / STATE / random_file(dist.get_rank())))
    except _READ_ERRORS as error:
        raise damaged(directory, f"an unreadable random state ({error})") from error


class _Box:
    """Offset and shape of a part of a tensor, including the prepended axis for the layer index."""

    def __init__(self, offset: Sequence[int], shape: Sequence[int]) -> None:
        self.offset, self.shape = tuple(offset), tuple(shape)

    @classmethod
    def of(cls, piece: ShardedTensor) -> _Box:
        return cls(piece.global_offset, (1,) * piece.prepend_axis_num + tuple(piece.local_shape))

    def overlap(self, other: _Box) -> _Box | None:
        starts = list(map(max, self.offset, other.offset))
        ends = list(map(min, self._ends(), other._ends()))
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return None
        return _Box(starts, [end - start for start, end in zip(starts, ends, strict=True)])

    def within(self, outer: _Box) -> tuple[slice, ...]:
        """Indices of this box inside `outer`."""
        starts = [inner - start for inner, start in zip(self.offset, outer.offset, strict=True)]
        return tuple(starmap(lambda start, size: slice(start, start + size), zip(starts, self.shape, strict=True)))

    def _ends(self) -> list[int]:
        return [start + size for start, size in zip(self.offset, self.shape, strict=True)]


class _Reader:
    """Pieces of a checkpoint by the key of their tensor."""

    def __init__(self, folder: Path, pieces: Sequence[_StoredPiece]) -> None:
        self._folder = folder
        self._pieces: dict[str, list[_StoredPiece]] = defaultdict(list)
        for piece in pieces:
            self._pieces[piece["tensor"]].append(piece)
        self._open: dict[str, safe_open] = {}

    def fill(self, wanted: ShardedTensor) -> None:
        """Copies the overlap of the stored pieces with `wanted` into its data."""
        box = _Box.of(wanted)
        assert wanted.data is not None
        target = wanted.data[(None,) * wanted.prepend_axis_num]
        filled = 0
        for piece in self._pieces.get(wanted.key, ()):
            # The padded size of the vocabulary depends on the layout; the state of the padding is 0 in every layout.
            if tuple(piece["whole"]) != tuple(wanted.global_shape) and not wanted.allow_shape_mismatch:
                raise ValueError(
                    f"{wanted.key} has shape {piece['whole']}, and {tuple(wanted.global_shape)} in this model"
                )
            saved = _Box(piece["offset"], piece["shape"])
            overlap = box.overlap(saved)
            if overlap is not None:
                part = self._file(piece["file"]).get_slice(piece["key"])[overlap.within(saved)[-wanted.data.dim() :]]
                target[overlap.within(box)] = part.reshape(overlap.shape)
                filled += math.prod(overlap.shape)
        if filled < wanted.data.numel() and not (wanted.allow_shape_mismatch and filled):
            raise ValueError(f"{wanted.key} is incomplete")

    def close(self) -> None:
        """Closes the files."""
        self._open.clear()

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]


Sharding: TypeAlias = ShardedTensor | ShardedTensorFactory


def _with_sharding(
    models: Sequence[ModelChunk], optimizer: MegatronOptimizer
) -> Iterator[tuple[ParameterState, Sharding]]:
    states = list(parameter_states(optimizer))
    sharded = {str(index): model.sharded_state_dict() for index, model in enumerate(models)}
    by_position = get_param_id_to_sharded_param_map(sharded, [state.parameter for state in states])
    for position, state in enumerate(states):
        yield state, by_position[position]


def _pieces(sharding: Sharding, tensor: Tensor, name: str) -> list[ShardedTensor]:
    """Views of `tensor`, the state `name` of one parameter's shard, as boxes of the unsharded tensor."""
    built = make_sharded_optimizer_tensor(sharding, tensor, name)
    pieces = list(nested_values(built.build())) if isinstance(built, ShardedTensorFactory) else [built]
    assert all(p.data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for p in pieces)
    return pieces


def written_by_this_shard(sharding: Sharding) -> bool:
    """Whether this rank's model-parallel position writes the state of the parameter.

    The last entry of `replica_id` counts data-parallel copies, the others count copies within the model.
    """
    replica = sharding.replica_id
    return isinstance(replica, int) or not any(replica[:-1])
