"""What one rank writes to a checkpoint: files and bytes, as the run's own code divides them, without writing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from megatron.core.optimizer.optimizer import MegatronOptimizer

from nemo_popsd.checkpoint.contents import STATE, WEIGHTS
from nemo_popsd.checkpoint.sharing import replicas, share_writing
from nemo_popsd.checkpoint.training_state import owned_states, written_by_this_shard
from nemo_popsd.checkpoint.weights import adapter_parameters, every_parameter, sharded_state
from nemo_popsd.compat.megatron_core import FILES_PER_RANK
from nemo_popsd.megatron.interfaces import ModelChunk

_FP32 = 4


@dataclass(frozen=True)
class CheckpointShare:
    """Bytes of a rank's shards, without small files."""

    files: tuple[str, ...]
    """That the rank writes."""
    written: int
    """In these files."""
    held: int
    """Of weights and optimizer state of which the rank or others that have the same write each once."""


def checkpoint_share(models: Sequence[ModelChunk], optimizer: MegatronOptimizer, *, adapters: bool) -> CheckpointShare:
    """Divides weights and optimizer state among the ranks that have them, as a save does.

    Args:
        models: this rank's chunks of the model, without wrappers.
        optimizer: Megatron's optimizer, whose state exists.
        adapters: whether the checkpoint has the adapters alone.
    """
    rank = dist.get_rank()
    tensors = sharded_state(models, adapter_parameters if adapters else every_parameter)
    with peers_of_shards():
        distribution = share_writing(tensors, replicas())
    shards = [shard for shard in nested_values(tensors) if isinstance(shard, ShardedTensor)]
    own = [shard for shard in shards if is_main_replica(shard.replica_id)]
    ours = own
    if distribution is not None:
        ours = [shard for shard in shards if _sharded_tensor_shard_id(shard) in distribution.shards_in_this_group]
    written, held = _bytes(own), _bytes(ours)
    files = [f"{WEIGHTS}/__{rank}_{number}.distcp" for number in range(min(FILES_PER_RANK, len(own)))]
    state_written = 0
    for state, sharding, owner in owned_states(models, optimizer):
        if written_by_this_shard(sharding):
            size = _FP32 * len(state.names) * state.parameter.numel()
            held += size
            state_written += size if state.group.rank() == owner else 0
    if state_written:
        files.append(f"{STATE}/rank-{rank:05d}.safetensors")
    return CheckpointShare(tuple(files), written + state_written, held)


def _bytes(shards: Sequence[ShardedTensor]) -> int:
    return sum(shard.data.numel() * shard.data.element_size() for shard in shards)


@contextmanager
def peers_of_shards() -> Iterator[None]:
    """Context in which the gather of `share_writing` has what the other ranks of `replicas` would contribute.

    They have the same shards, counted by the last number of `replica_id`, and the shards of other experts, of the same
    sizes.
    """
    group = replicas()
    members = dist.get_process_group_ranks(group)
    split = parallel_state.get_expert_tensor_parallel_world_size()
    experts = parallel_state.get_expert_model_parallel_world_size()
    of_stage = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()

    def expert_place(member: int) -> tuple[int, int]:
        """Which experts, or parts of experts, and which copy of them."""
        rank = members[member] % of_stage
        return rank % (split * experts), rank // (split * experts)

    own_place, _ = expert_place(group.rank())

    def of_peer(shard: Any, member: int) -> Any:
        peer, index = copy.copy(shard), member
        if ".experts." in shard.key:
            place, index = expert_place(member)
            if place != own_place:
                peer.key = f"{shard.key}, of {place}"
        peer.replica_id = (*shard.replica_id[:-1], index)
        return peer

    def gathered(found: list[Any], shards: Sequence[Any], group: object) -> None:
        found[:] = [[of_peer(shard, member) for shard in shards] for member in range(len(found))]

    with mock.patch.object(dist, "all_gather_object", gathered):
        yield
