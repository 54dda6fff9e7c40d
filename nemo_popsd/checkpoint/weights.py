"""Megatron distributed checkpoints: each rank writes and reads its shards, any layout can be read back."""

from __future__ import annotations

import queue
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.build import Model, chunks_of


def save_weights(model: Model, directory: Path) -> None:
    """Writes the model's sharded state, adapters included. Collective over all ranks.

    Args:
        model: the bare model, or its chunks.
        directory: must exist and be empty, on a file system that all ranks share.
    """
    # Megatron collects the writers' results through a manager process (filesystem_async.py:55), which re-imports the
    # program and can outlive it. A save that is awaited needs no second process.
    filesystem_async._results_queue = queue.Queue()
    state = {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks_of(model))}
    dist_checkpointing.save(state, str(directory), async_sharded_save=False)


def load_weights(model: Model, directory: Path) -> None:
    """Reads the model's sharded state in the layout of `model`. Collective over all ranks.

    Raises:
        UserError: the directory holds no complete distributed checkpoint, or one of another model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise _unusable(directory, "no Megatron distributed checkpoint")
    try:
        state, unread, absent = dist_checkpointing.load(
            {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks_of(model))},
            str(directory),
            strict=StrictHandling.RETURN_ALL,
        )
    except (CheckpointException, CheckpointingException, EOFError, OSError, UnpicklingError) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise _unusable(directory, f"one that cannot be read ({reason})") from error
    missing, left_over = set(absent), set(unread)
    for number, chunk in enumerate(chunks_of(model)):
        of_chunk = _fill(chunk, state[str(number)])
        missing |= of_chunk[0]
        left_over |= of_chunk[1]
    missing, left_over = ({name for name in names if "_extra_state" not in name} for names in (missing, left_over))
    if missing or left_over:
        raise _unusable(directory, f"missing {sorted(missing)[:4]}, left over {sorted(left_over)[:4]}")


def _fill(model: GPTModel, state: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Loads `state` into `model`; names that it lacks, and names that it has too many."""
    # A linear with an adapter is stored under its own name (adapter_wrapper.py:187), and loaded under the wrapper's.
    wrapped = {name.removesuffix(".to_wrap") for name, _ in model.named_modules() if name.endswith(".to_wrap")}
    keys = {name: ".to_wrap.".join(name.rsplit(".", 1)) for name in state if name.rpartition(".")[0] in wrapped}
    missing, unexpected = model.load_state_dict({keys.get(k, k): v for k, v in state.items()}, strict=False)
    return set(missing), set(unexpected)


def _unusable(directory: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {directory}",
        got=got,
        need="weights written by nemo_popsd for the model in model_config.yaml",
        mend="give another checkpoint",
    )
