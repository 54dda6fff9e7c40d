"""Megatron distributed checkpoints: each rank writes and reads a part of its shards, and any layout can read them."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nemo_popsd.checkpoint.distributed_tensors import Piece, write_distributed_tensors
from nemo_popsd.checkpoint.shares import Share, gathered, summary
from nemo_popsd.checkpoint.sharing import SharedReading, replicas, share_writing
from nemo_popsd.checkpoint.trust import safe_unpickling
from nemo_popsd.compat.megatron_core import stage_save
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.interfaces import ModelChunk

logger = logging.getLogger(__name__)

ParameterFilter = Callable[[str], bool]
"""Whether a parameter is saved or loaded, by its name."""


_Bucket: TypeAlias = tuple[str, str, tuple[list[tuple[WriteItem, object]], list[tuple[WriteItem, torch.Tensor]]]]
"""Content of one file: its path, its key in the metadata, and its objects and tensors."""


def every_parameter(name: str) -> bool:
    """Selects all parameters."""
    return True


def adapter_parameters(name: str) -> bool:
    """Selects the parameters of adapters."""
    return ".adapter." in name


class StagedWeights:
    """Weights to be written: staging and `finish` are collective, `write` uses no collectives."""

    def __init__(self, models: Sequence[ModelChunk], directory: Path, *, which: ParameterFilter, copy: bool) -> None:
        """Plans which rank writes which shards. Collective over all ranks: one gather among the ranks that have the
        same weights, and one gather and one scatter of plans.

        Args:
            models: this rank's chunks of the model, without wrappers.
            directory: must exist and be empty, on a file system that all ranks share.
            which: parameters to write.
            copy: whether copies in host memory are written, so that training can continue during the write.
        """
        # Megatron's `_get_write_results_queue` starts a manager process, which re-imports the program and can outlive
        # it; its writers are forked, which is unsafe with threads. Here the caller's thread writes, and an ordinary
        # queue is sufficient.
        filesystem_async._results_queue = queue.Queue()
        state = sharded_state(models, which)
        share_writing(state, replicas())
        request = stage_save(state, directory)
        self._finish = request.finalize_fns
        self._results: queue.Queue[dict[int, list[WriteResult]]] | None = None
        self._transforms: list[object] = []
        self._buckets: list[_Bucket] = []
        if request.async_fn is not None:
            self._transforms = request.async_fn.args[0]
            _, buckets, self._results = request.async_fn_args
            self._buckets = request.preload_fn() if request.preload_fn else buckets
        if copy:
            # Megatron has copied to the host what was on a device, and views of larger buffers.
            training = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
            self._buckets = [
                (path, key, (objects, [(item, _copy_of(tensor, training)) for item, tensor in tensors]))
                for path, key, (objects, tensors) in self._buckets
            ]
        self.bytes = sum(t.numel() * t.element_size() for _, _, (_, tensors) in self._buckets for _, t in tensors)
        self.files = [Path(path) for path, _, _ in self._buckets]

    def write(self) -> None:
        """Writes and flushes this rank's files. May run in another thread.

        Raises:
            OSError: the file system failed.
        """
        written: dict[int, list[WriteResult]] = {}
        for index, bucket in enumerate(self._buckets):
            results: queue.Queue[tuple[int, list[WriteResult] | Exception]] = queue.Queue()
            token: queue.Queue[int] = queue.Queue()
            token.put(index)
            FileSystemWriterAsync.write_preloaded_data(self._transforms, index, bucket, results, token, use_fsync=True)
            _, outcome = results.get()
            if isinstance(outcome, Exception):
                raise _system_error(outcome) or outcome
            written[index] = outcome
        if self._buckets:
            assert self._results is not None
            self._results.put(written)
        self._buckets = []

    def finish(self) -> None:
        """Writes the metadata after every rank has written. Collective over all ranks.

        Raises:
            OSError: the file system failed; raised on rank 0 only.
        """
        failed: OSError | None = None
        for function in self._finish:
            try:
                function()
            except OSError as error:
                failed = failed or error
                dist.barrier()  # Each of Megatron's functions ends with a barrier, at which the other ranks wait.
        if failed:
            raise failed


class StagedPieces:
    """Weights that rank 0 computes while it writes them; the interface is that of `StagedWeights`."""

    def __init__(self, pieces: Sequence[Piece], directory: Path) -> None:
        """Keeps references only.

        Args:
            pieces: pieces of all tensors; see `write_distributed_tensors`.
            directory: must exist and be empty.
        """
        self._pieces = pieces if dist.get_rank() == 0 else ()
        self._directory = directory
        self.bytes = sum(piece.bytes for piece in self._pieces)

    @property
    def files(self) -> list[Path]:
        """Files that this rank has written."""
        return sorted(self._directory.iterdir()) if self._pieces else []

    def write(self) -> None:
        """Writes all files on rank 0; does nothing on the other ranks.

        Raises:
            OSError: the file system failed.
            UserError: the source of the pieces is damaged.
        """
        if not self._pieces:
            return
        try:
            write_distributed_tensors(self._directory, self._pieces)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error

    def finish(self) -> None:
        """Does nothing: `write` has written the metadata."""


def load_weights(models: Sequence[ModelChunk], directory: Path, *, which: ParameterFilter = every_parameter) -> None:
    """Loads the weights in the layout of `models`. Ranks with the same weights each read a part of them.
    Collective over all ranks, see `SharedReading`. Logs sizes and seconds. Runs no code from the files.

    Args:
        models: this rank's chunks of the model, without wrappers.
        directory: the distributed checkpoint.
        which: parameters to load; the checkpoint must not contain others.

    Raises:
        UserError: the directory is not a complete distributed checkpoint of this model, or refers to code.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise _unusable(directory, "no Megatron distributed checkpoint")
    reading, share = SharedReading(replicas()), Share()
    try:
        with safe_unpickling(), share.timed("read"):
            states, not_loaded, not_stored = dist_checkpointing.load(
                sharded_state(models, which), str(directory), reading, strict=StrictHandling.RETURN_ALL
            )
    except (CheckpointException, CheckpointingException, EOFError, OSError, UnpicklingError) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise _unusable(directory, f"an unreadable distributed checkpoint ({reason})") from reason
    missing: set[str] = set(not_stored)
    unexpected: set[str] = set(not_loaded)
    for index, model in enumerate(models):
        state = states[str(index)]
        # A layer with an adapter is saved with its own name (`AdapterWrapper.sharded_state_dict`), and loaded with that
        # of the wrapper's attribute.
        wrapped = {name.removesuffix(".to_wrap") for name, _ in model.named_modules() if name.endswith(".to_wrap")}
        keys = {name: ".to_wrap.".join(name.rsplit(".", 1)) for name in state if name.rpartition(".")[0] in wrapped}
        renamed = {keys.get(name, name): tensor for name, tensor in state.items()}
        without_value, without_parameter = model.load_state_dict(renamed, strict=False)
        missing |= {name for name in without_value if which(name)}
        unexpected |= set(without_parameter)
    missing, unexpected = ({n for n in names if "_extra_state" not in n} for names in (missing, unexpected))
    if missing or unexpected:
        raise _unusable(
            directory, f"missing tensors {sorted(missing)[:4]}, unexpected tensors {sorted(unexpected)[:4]}"
        )
    share.bytes = reading.bytes
    logger.info("loaded %s: %s", directory, summary(gathered(share)))


def _copy_of(tensor: torch.Tensor, training: Collection[int]) -> torch.Tensor:
    """A copy if the tensor is in one of the storages at `training`, which the next step changes."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in training else tensor


def sharded_state(models: Sequence[ModelChunk], which: ParameterFilter) -> dict[str, object]:
    """This rank's shards of the selected tensors, by chunk and name.

    Transformer Engine's extra state is left out: it is a pickle, and only fp8 uses it.
    """
    return {
        str(index): {
            name: entry
            for name, entry in model.sharded_state_dict().items()
            if which(name) and not isinstance(entry, ShardedObject)
        }
        for index, model in enumerate(models)
    }


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error among the causes of `error`; torch's zip writer hides it behind a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _unusable(directory: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {directory}",
        got=got,
        need="weights written by nemo_popsd for the model in model_config.yaml",
        fix="use another checkpoint",
    )
