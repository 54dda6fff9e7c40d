"""Megatron distributed checkpoints: each rank writes and reads its shards, any layout can be read back."""

from __future__ import annotations

import queue
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel

from nemo_popsd.errors import UserError


def save_weights(model: GPTModel, directory: Path) -> None:
    """Writes the model's sharded state, adapters included. Collective over all ranks.

    Args:
        model: the bare model.
        directory: must exist and be empty, on a file system that all ranks share.
    """
    # Megatron collects the writers' results through a manager process (filesystem_async.py:55), which re-imports the
    # program and can outlive it. A save that is awaited needs no second process.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(model.sharded_state_dict(), str(directory), async_sharded_save=False)


def load_weights(model: GPTModel, directory: Path) -> None:
    """Reads the model's sharded state in the layout of `model`. Collective over all ranks.

    Raises:
        UserError: the directory holds no complete distributed checkpoint, or one of another model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(
            f"checkpoint {directory}",
            got="no Megatron distributed checkpoint",
            need="a directory written by nemo_popsd",
            mend="give another checkpoint",
        )
    state = dist_checkpointing.load(model.sharded_state_dict(), str(directory))
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if "_extra_state" not in name]
    if missing or unexpected:
        raise UserError(
            f"checkpoint {directory}",
            got=f"missing {missing[:4]}, left over {unexpected[:4]}",
            need="the tensors of the model in model_config.yaml",
            mend="give another checkpoint",
        )
