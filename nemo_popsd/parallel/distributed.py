"""Process groups and random state: torch.distributed's default group and Megatron's groups inside it.

Megatron owns all groups except the default one. A single process without a launcher gets a group of one rank.
"""

from __future__ import annotations

import logging
import random
import threading
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from nemo_popsd.errors import TransientError, UserError, describe_error
from nemo_popsd.parallel import launcher
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.waiting import create_waiting_group
from nemo_popsd.runtime.cpu import adapt_megatron

logger = logging.getLogger(__name__)

_LONGEST_START = timedelta(minutes=30)
"""Maximum time that a rank waits for the others to connect."""
_PATIENCE_SECONDS = 20.0
_PATIENCE_OF_OTHERS_SECONDS = 300.0
"""Time after which a rank logs that it waits for others: first rank 0, later the others, in case rank 0 is missing."""


def device() -> torch.device:
    """This process's device: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def world_size() -> int:
    """Number of processes: that of the default group, or of the launcher if there is no group."""
    return dist.get_world_size() if dist.is_initialized() else launcher.world_size()


def initialize(parallel: ParallelConfig, *, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Create the default group (NCCL with CUDA, otherwise gloo) and Megatron's groups, and set the seeds. Collective.

    Reads the launcher's variables, see `nemo_popsd.parallel.launcher`. Idempotent for the same layout.

    Args:
        parallel: the layout; the remaining factor of the world size is data parallelism.
        seed: seed, equal on all ranks; Megatron derives the seeds of tensor-parallel regions from it.
        timeout: a collective that waits longer fails on every rank.

    Raises:
        UserError: the layout does not divide the world size or differs from the layout of this process, or there is no
            GPU for this rank.
        TransientError: not all processes connected in time.
    """
    adapt_megatron()
    if torch.cuda.is_available():
        _select_device(launcher.read_launch().local_rank)
    if not dist.is_initialized():
        launch = launcher.read_launch()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=_store(launch, timeout),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            # Without a device id, NCCL guesses the device at the first barrier.
            device_id=device() if torch.cuda.is_available() else None,
        )
    parallel.check_world(dist.get_world_size())
    create_waiting_group()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            hierarchical_context_parallel_sizes=parallel.context_sizes or None,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_shards,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
    present = _sizes_of_groups()
    if (present.sizes, present.expert_shards) != (parallel.sizes, parallel.expert_shards):
        raise UserError(
            "layout",
            got=f"{parallel.describe()} in a process whose groups were created for {present.describe()}",
            need="one layout in a process",
            fix=f"set {present.describe()}, or build the trainer from the same configuration as the model",
        )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _select_device(index: int) -> None:
    if index >= torch.cuda.device_count():
        raise UserError(
            "launcher",
            got=f"LOCAL_RANK={index} on a machine where torch sees {torch.cuda.device_count()} GPUs",
            need="a GPU for each rank",
            fix="start fewer ranks per node, or set CUDA_VISIBLE_DEVICES to more GPUs",
        )
    torch.cuda.set_device(index)


def _store(launch: launcher.Launch, timeout: timedelta) -> dist.Store:
    """Return the rendezvous store; a single process needs no port."""
    if launch.world_size == 1:
        return dist.HashStore()
    place = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
    patience = _PATIENCE_SECONDS if launch.rank == 0 else _PATIENCE_OF_OTHERS_SECONDS
    reminder = threading.Timer(patience, _log_waiting, (launch, place))
    reminder.daemon = True
    reminder.start()
    limit = min(timeout, _LONGEST_START)
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TransientError(
            f"rank {launch.rank} of {launch.world_size}",
            got=f"not all ranks of the run connected to {place} within {limit}",
            fix="find out why the other ranks did not start; start all ranks of a run with the same MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE",
            advice=[describe_error(error)],
        ) from error
    finally:
        reminder.cancel()
    store.set_timeout(timeout)
    # torchrun with a static rendezvous keeps its store; restarted ranks would find the addresses of ended ranks in it.
    return dist.PrefixStore(f"start-{launcher.restarts()}/default_pg", store)


def _log_waiting(launch: launcher.Launch, place: str) -> None:
    logger.error(
        "rank %d waits for the other ranks of WORLD_SIZE=%d at %s; for a single process "
        "`unset RANK WORLD_SIZE LOCAL_RANK`",
        launch.rank,
        launch.world_size,
        place,
    )


def _sizes_of_groups() -> ParallelConfig:
    experts = parallel_state.get_expert_model_parallel_world_size()
    return ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        context=parallel_state.get_context_parallel_world_size(),
        expert=experts,
        expert_tensor=parallel_state.get_expert_tensor_parallel_world_size() if experts > 1 else 0,
    )


def shutdown() -> None:
    """Destroy Megatron's groups and the default group."""
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


def all_reduce_max(value: float) -> float:
    """Return the maximum of `value` over all ranks: one all-reduce of one number over the world."""
    largest = torch.tensor(value, device=device(), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank of the world: one all-reduce of one number."""
    return all_reduce_max(float(flag)) > 0
