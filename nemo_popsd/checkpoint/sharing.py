"""Divides the writing and reading of replicated shards: one rank writes a shard, one reads it and sends it to the
others.

Data-parallel and context-parallel ranks have the same weights. Megatron's greedy assignment, which every rank computes
from the same list, gives each about the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemo_popsd.parallel.distributed import on_any_rank


def replicas() -> dist.ProcessGroup:
    """The ranks that have the same weights outside experts; contains groups of ranks with the same experts, or parts of
    such groups.
    """
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def share_writing(state: dict[str, Any], group: dist.ProcessGroup) -> ShardDistribution | None:
    """Assigns each shard to one of the ranks of `group` that hold it. Collective over `group`: one gather of objects.

    Shards that a replica outside `group` writes remain assigned to it.

    Args:
        state: sharded tensors of this rank; their factories are applied, and `replica_id` is set to 0 if this rank
            writes the shard.
        group: see `replicas`.

    Returns:
        The rank of the group that writes each shard; None if the group has one rank.
    """
    apply_factories(state)
    distribution = determine_main_replica_uniform_distribution(state, group)
    distribute_main_replicas_with_precomputed_distribution(state, group, distribution)
    return distribution


class SharedReading(TorchDistLoadShardedStrategy):  # type: ignore[misc]  # Megatron has no types
    """Megatron's reader, changed so that each rank reads only its part.

    Attributes:
        bytes: bytes that this rank read from files in the last `load`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Reads nothing.

        Args:
            group: ranks that share the reading; see `replicas`.
        """
        super().__init__()
        self._group = group
        self.bytes = 0

    def load(self, state: dict[str, Any], directory: Path, *options: Any) -> dict[str, Any]:
        """Loads into the data of the shards.

        Collective over the world: one all-reduce of one number. Collective over the group: one gather of objects, and
        per shard one broadcast, or one message to each rank that holds the shard if not all ranks of the group do.

        Args:
            state: sharded tensors of this rank, with data.
            directory: the distributed checkpoint.
            options: options of Megatron's reader.

        Raises:
            CheckpointException: on every rank, with megatron-core 0.16, if a rank cannot read its part.
            CheckpointingException: another rank cannot read its part; it raises its own error.
        """
        shards = {_sharded_tensor_shard_id(shard): shard for shard in nested_values(state)}
        distribution = determine_main_replica_uniform_distribution(state, self._group, ignore_groups=True)
        reader = {} if distribution is None else distribution.main_rank_for_shard
        own = {
            name: shard for name, shard in shards.items() if reader.get(name, self._group.rank()) == self._group.rank()
        }
        self.bytes = sum(shard.data.numel() * shard.data.element_size() for shard in own.values())
        loaded: dict[Any, Tensor] = {}
        error: BaseException | None = None
        try:
            loaded = super().load(dict(own), directory, *options)
        except (Exception, CheckpointException) as raised:  # torch derives it from BaseException
            error = raised
        if on_any_rank(error is not None):  # no rank waits for what another one could not read
            raise error or CheckpointingException("another rank cannot read its part")
        if distribution is not None:
            self._exchange(shards, loaded, distribution)
        result: dict[str, Any] = dict_list_map_outplace(lambda shard: loaded[_sharded_tensor_shard_id(shard)], state)
        return result

    def _exchange(
        self, shards: Mapping[Any, ShardedTensor], loaded: dict[Any, Tensor], distribution: ShardDistribution
    ) -> None:
        """Sends the shards that this rank has read, and receives the others in place. All ranks use the same order."""
        rank, everybody = self._group.rank(), self._group.size()
        for name, source in distribution.main_rank_for_shard.items():
            holders = distribution.all_ranks_for_shard[name]
            if len(holders) == 1 or rank not in holders:
                continue
            data = loaded[name] if rank == source else shards[name].data.detach()
            sent = data.contiguous().reshape(-1).view(torch.uint8)
            if len(holders) == everybody:
                dist.broadcast(sent, group=self._group, group_src=source)
            elif rank == source:
                for other in holders:
                    if other != source:
                        dist.send(sent, group=self._group, group_dst=other)
            else:
                dist.recv(sent, group=self._group, group_src=source)
            if rank != source:
                loaded[name] = data if data.is_contiguous() else data.copy_(sent.view(data.dtype).view(data.shape))
