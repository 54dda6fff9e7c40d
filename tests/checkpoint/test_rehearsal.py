"""A save of 70B over 64 ranks, without memory: which rank writes how many bytes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.config.loading import load_config
from nemo_popsd.planning.checkpoint import checkpoint_bytes
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from tests.harness import run_ranks
from tests.megatron.test_real_sizes import whole_shapes, without_memory

MODEL = "DeepSeek-R1-Distill-Llama-70B"
TENSOR, STAGES, REPLICAS = 8, 2, 4
CONF = Path(__file__).resolve().parents[2] / "conf" / "r1_distill_llama_70b.yaml"


def rehearse(rank: int, world_size: int, directory: Path) -> dict[tuple[int, int], Any]:
    """Bytes of weights and of optimizer state by replica, of the first two tensor-parallel ranks of each stage."""
    from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map

    from nemo_popsd.checkpoint import sharing, training_state, weights
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    def all_replicas(found: list[Any], shards: list[Any], group: Any) -> None:
        """Result of the gather: ranks with the same weights differ in the last number of a shard's replica."""
        for index in range(len(found)):
            found[index] = [copy.copy(shard) for shard in shards]
            for shard in found[index]:
                shard.replica_id = (*shard.replica_id[:-1], index)

    dist.destroy_process_group()
    whole_shapes(MODEL, directory)
    source, found = HuggingFaceModel(directory), {}
    parallel = ParallelConfig(tensor=TENSOR, pipeline=STAGES, context=REPLICAS)
    for stage in range(STAGES):
        for tensor in range(2):
            with without_memory(stage * TENSOR * REPLICAS + tensor, TENSOR * STAGES * REPLICAS):
                initialize(parallel, seed=1)
                provider = source.provider()
                provider.init_model_with_meta_device = True
                with torch.device("meta"):
                    [gpt] = build_chunks(provider, StudentConfig(precision="bf16", adaptation="full"), parallel)
                group = sharing.replicas()
                state = weights.sharded_state([gpt], weights.every_parameter)
                with mock.patch("torch.distributed.all_gather_object", all_replicas):
                    sharing.apply_factories(state)
                    plan = sharing.determine_main_replica_uniform_distribution(state, group)
                    sharing.share_writing(state, group)
                own = [shard for shard in sharing.nested_values(state) if shard.replica_id == 0]
                written = [0] * REPLICAS
                for shard, replica in plan.main_rank_for_shard.items():
                    metadata = plan.shard_to_metadata[shard]
                    written[replica] += math.prod(metadata.local_shape) * metadata.dtype.itemsize
                parameters = list(gpt.parameters())
                shardings = get_param_id_to_sharded_param_map({"0": gpt.sharded_state_dict()}, parameters)
                kept = [0] * REPLICAS
                for index, owner in enumerate(training_state._owners([(p.numel(), group) for p in parameters])):
                    if training_state.written_by_this_shard(shardings[index]):
                        kept[owner] += 12 * parameters[index].numel()
                found[stage, tensor] = written, kept, sum(shard.data.nbytes for shard in own), len(own)
    return found


@pytest.mark.slow
def test_the_ranks_of_70b_write_what_is_planned_in_equal_parts(tmp_path: Path) -> None:
    [found] = run_ranks(rehearse, 1, tmp_path)
    settings = ["student.adaptation=full", f"parallel.context={REPLICAS}", f"parallel.pipeline={STAGES}"]
    plan = PlanConfig(gpus_per_node=TENSOR)
    case = Case(load_config(CONF, settings), plan, read_sizes(MODEL)[0], STAGES * REPLICAS)
    assert (case.layout.tensor, case.layout.data) == (TENSOR, 1)
    planned = checkpoint_bytes(case)
    weights = state = 0
    shares = []
    for (_, tensor), (written, kept, own, shards) in found.items():
        alike = 1 if tensor == 0 else TENSOR - 1
        weights += alike * sum(written)
        state += alike * sum(kept)
        shares += [sum(both) for both in zip(written, kept, strict=True)]
        assert own == written[0]
        assert shards > 40, "many shards: two files"
        assert max(written) < 1.01 * min(written)
        assert max(kept) < 1.02 * min(kept)
    assert (weights, state) == (planned.weights, planned.state)
    assert max(shares) == pytest.approx(planned.share, rel=0.01)
    assert max(shares) < 15.6e9
