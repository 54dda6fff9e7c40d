"""Megatron distributed checkpoints: each rank writes and reads its shards, any layout can be read back."""

from __future__ import annotations

import queue
from pathlib import Path
from pickle import UnpicklingError

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

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
        raise _unusable(directory, "no Megatron distributed checkpoint")
    try:
        state, unread, absent = dist_checkpointing.load(
            model.sharded_state_dict(), str(directory), strict=StrictHandling.RETURN_ALL
        )
    except (CheckpointException, CheckpointingException, EOFError, OSError, UnpicklingError) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise _unusable(directory, f"one that cannot be read ({reason})") from error
    # A linear with an adapter is stored under its own name (adapter_wrapper.py:187), and loaded under the wrapper's.
    wrapped = {name.removesuffix(".to_wrap") for name, _ in model.named_modules() if name.endswith(".to_wrap")}
    keys = {name: ".to_wrap.".join(name.rsplit(".", 1)) for name in state if name.rpartition(".")[0] in wrapped}
    missing, unexpected = model.load_state_dict({keys.get(k, k): v for k, v in state.items()}, strict=False)
    missing, left_over = (
        sorted(name for name in names if "_extra_state" not in name)
        for names in ({*missing, *absent}, {*unexpected, *unread})
    )
    if missing or left_over:
        raise _unusable(directory, f"missing {missing[:4]}, left over {left_over[:4]}")


def _unusable(directory: Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {directory}",
        got=got,
        need="weights written by nemo_popsd for the model in model_config.yaml",
        mend="give another checkpoint",
    )
