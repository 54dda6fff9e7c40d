"""Process groups and random state: torch.distributed's one default group, and Megatron's inside it.

Megatron owns every group but the default one. A single process without a launcher gets a group of one.
"""

from __future__ import annotations

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import ParallelConfig
from nemo_popsd.runtime.cpu import adapt_to_cpu
from nemo_popsd.runtime.meeting import prepare_meeting


def device() -> torch.device:
    """This process's device: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def world_size() -> int:
    """Number of processes: of the default group, or as the launcher says where there is none yet."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelConfig, *, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Makes the default group (NCCL with CUDA, gloo without), Megatron's groups and the seeds. Collective.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Idempotent for the
    same layout.

    Args:
        parallel: the layout; data parallelism takes the rest of the world.
        seed: base seed, the same on every rank; Megatron derives those of tensor-parallel regions.
        timeout: a collective that waits longer fails on every rank.

    Raises:
        UserError: the world does not divide by the layout, or this process has another one.
    """
    adapt_to_cpu()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            # NCCL is told its device: otherwise it guesses one at the first barrier.
            own = device() if torch.cuda.is_available() else None
            dist.init_process_group(backend, timeout=timeout, device_id=own)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel.check_world(dist.get_world_size())
    prepare_meeting()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            # An expert is whole on its rank where experts are shared out, and split like other matrices elsewhere.
            expert_tensor_parallel_size=1 if parallel.expert > 1 else parallel.tensor,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
    present = _sizes_of_groups()
    if present.describe() != parallel.describe():
        raise UserError(
            "layout",
            got=f"{parallel.describe()} in a process whose groups were made for {present.describe()}",
            need="one layout in the life of a process",
            mend=f"set {present.describe()}, or build the trainer from the same configuration as the model",
        )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _sizes_of_groups() -> ParallelConfig:
    return ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        context=parallel_state.get_context_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
    )


def shutdown() -> None:
    """Destroys Megatron's groups and the default one."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def layout() -> dict[str, int]:
    """Sizes of the parallel groups."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def greatest_of_all_ranks(number: float) -> float:
    """The greatest `number` of the world: one all-reduce of one number."""
    value = torch.tensor(number, device=device(), dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank of the world: one all-reduce of one number."""
    return greatest_of_all_ranks(float(flag)) > 0
