"""megatron-core 0.16 and 0.19."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

COMMON_STATE = "common.pt"
"""File of a distributed checkpoint with the state that is the same on all ranks, which 0.16 requires and 0.19 reads."""

FILES_PER_RANK: int = inspect.signature(TorchDistSaveShardedStrategy).parameters["thread_count"].default
"""Largest number of files among which a save divides the shards of a rank: 2 in 0.16, 1 in 0.19."""


class _SeparateCommonState(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron has no types
    """Writes no common state among the shards, where 0.19 has it as a pickle and 0.16 does not expect it."""

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str) -> AsyncRequest:
        """As the library's own; `async_strategy` is that of `stage_save`."""
        state = {key: value for key, value in sharded_state_dict.items() if key != "common_state"}
        return super().async_save(state, checkpoint_dir, async_strategy)


def stage_save(state: Mapping[str, Any], directory: Path) -> AsyncRequest:
    """Plans a distributed checkpoint that both versions load, to be written later. Collective over all ranks.

    0.16 writes `COMMON_STATE` and then returns its own request. 0.19 has two kinds of requests, of which it prefers
    that of the package nvidia-resiliency-ext; its own is the same as in 0.16.

    Args:
        state: sharded tensors only.
        directory: must exist and be empty.
    """
    if "async_strategy" not in inspect.signature(dist_checkpointing.save).parameters:
        request = dist_checkpointing.save(dict(state), str(directory), async_sharded_save=True)
    else:
        strategy = _SeparateCommonState()
        request = dist_checkpointing.save(
            dict(state), str(directory), strategy, async_sharded_save=True, async_strategy="mcore"
        )
        if dist.get_rank() == 0:
            torch.save({}, directory / COMMON_STATE)
    assert request is not None
    return request
