"""The rollout engine that `rollout.engine` names, put together from the student's parts."""

from __future__ import annotations

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.embedded.names import local_path
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.student import Student
from nemo_popsd.rollout.engine import RolloutEngine
from nemo_popsd.rollout.megatron_engine import MegatronEngine
from nemo_popsd.rollout.vllm.engine import VllmEngine
from nemo_popsd.rollout.vllm.environment import server_environment
from nemo_popsd.rollout.vllm.ranks import ServerRanks
from nemo_popsd.rollout.vllm.supervisor import Launch, VllmServer

logger = logging.getLogger(__name__)

LOGS = "vllm"
"""Folder of the servers' logs below `output`."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def build_engine(
    settings: PopsdConfig,
    student: Student,
    architecture: HuggingFaceModel,
    *,
    weights_version: Callable[[], int],
    longest: Callable[[], int],
    stop_requested: Callable[[], bool],
) -> RolloutEngine:
    """The engine that draws from the student's live weights. Collective over the world; starts no server yet.

    Args:
        settings: the run.
        student: whose weights draw.
        architecture: what they are weights of.
        weights_version: number of optimizer steps behind them.
        longest: tokens of the longest sequence that is to be expected.
        stop_requested: see `StopSignals.while_decoding`.
    """
    rollout = settings.rollout
    if rollout.engine == "megatron":
        return MegatronEngine(
            student.chunks,
            vocab_size=student.vocab_size,
            batch_rows=rollout.batch_rows,
            cache_tokens=rollout.cache_tokens,
            weights_version=weights_version,
            stop_requested=stop_requested,
        )
    base = adapter_base(settings, student)
    ranks = server_ranks(timeout=timedelta(seconds=settings.training.collective_timeout))
    devices = None if rollout.vllm.launcher else _devices(ranks, rollout.vllm.tensor)
    return VllmEngine(
        ranks,
        start=lambda limit: VllmServer(
            server_launch(
                settings,
                base or _written_files(architecture, Path(settings.output) / LOGS / f"model-{ranks.number}"),
                limit,
                ranks.number,
                devices,
                adapter=bool(base),
                overrides=architecture.overrides,
            )
        ),
        weights=lambda: (architecture.stream_adapters if base else architecture.stream)(student.chunks),
        kind="adapter" if base else "weights",
        weights_version=weights_version,
        longest=longest,
        bucket_bytes=rollout.vllm.bucket_bytes,
        restarts=rollout.vllm.restarts,
        sleep=rollout.vllm.sleep,
        stop_requested=stop_requested,
    )


def engine_name(settings: PopsdConfig) -> str:
    """What samples of an evaluation say of the engine that drew them: another one draws other tokens."""
    vllm, precision = settings.rollout.vllm, settings.student.precision
    if settings.rollout.engine == "megatron":
        return f"Megatron, {precision}"
    return f"vLLM, {precision if vllm.dtype == 'student' else vllm.dtype}"


def server_ranks(*, timeout: timedelta) -> ServerRanks:
    """The groups of this rank's replica and of the ranks it gathers weights with. Collective over the world.

    Args:
        timeout: a rank that waits longer for the others fails.
    """
    number = parallel_state.get_data_parallel_rank()
    if dist.get_world_size() == 1:
        return ServerRanks(replica=None, domain=None, number=number)
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    members: dict[int, list[int]] = defaultdict(list)
    for rank, of_rank in enumerate(numbers):
        members[of_rank].append(rank)
    groups: dict[int, Any] = {
        of: dist.new_group(ranks, backend="gloo", timeout=timeout) for of, ranks in sorted(members.items())
    }
    replica = groups[number] if len(members[number]) > 1 else None
    domain = replica
    if parallel_state.get_expert_model_parallel_world_size() > 1:  # experts are shared out over replicas
        domain = dist.new_group(list(range(len(numbers))), backend="gloo", timeout=timeout)
    return ServerRanks(replica=replica, domain=domain, number=number)


def adapter_base(settings: PopsdConfig, student: Student) -> Path | None:
    """Directory that vLLM reads the base from when the adapters alone are sent to it; None when all weights are.

    Merged weights are rounded to vLLM's precision. In bf16 that drops a change of a weight of less than one part in
    512, so what young adapters have learnt would not be in the rollouts at all.

    Raises:
        UserError: `rollout.vllm.lora=adapter` cannot be.
    """
    source, wanted = settings.student.source, settings.rollout.vllm.lora
    if settings.student.adaptation != "lora" or wanted == "merged":
        return None
    path = local_path(source)
    hindrance = ""
    if student.chunks[0].config.num_moe_experts is not None:
        hindrance = "a model with experts"
    elif settings.student.lora.rank > _LORA_RANKS[-1]:
        hindrance = f"student.lora.rank={settings.student.lora.rank}"
    elif not any(path.glob("*.safetensors")):
        hindrance = f"student.source={source!r}, which is no Hugging Face directory"
    if not hindrance:
        return path
    if wanted == "adapter":
        raise UserError(
            "configuration",
            got=f"rollout.vllm.lora=adapter with {hindrance}",
            need=f"a dense model in a Hugging Face directory, and a rank of at most {_LORA_RANKS[-1]}",
            fix="set rollout.vllm.lora=merged",
        )
    logger.warning("vLLM gets the adapters merged into weights, rounded to its precision: %s", hindrance)
    return None


def _written_files(architecture: HuggingFaceModel, place: Path) -> Path:
    """The model's files in a place of the run's own: a server may start again when the directory that they were read
    from, a checkpoint that is superfluous since, is gone.
    """
    place.mkdir(parents=True, exist_ok=True)
    architecture.copy_artifacts(place)
    return place


def server_launch(
    settings: PopsdConfig,
    model: Path,
    limit: int,
    replica: int,
    devices: str | None,
    *,
    adapter: bool,
    overrides: Mapping[str, Any] | None = None,
) -> Launch:
    """How the server of a replica is started.

    Args:
        settings: the run.
        model: directory with the ``config.json``.
        limit: tokens of the longest sequence.
        replica: number of the replica.
        devices: GPUs of the server; None leaves the choice to the environment.
        adapter: whether it reads the weights from `model` and is sent LoRA adapters; otherwise it is sent weights.
        overrides: keys of ``config.json``, whatever the file says.
    """
    vllm = settings.rollout.vllm
    arguments: dict[str, Any] = {
        "model": str(model.absolute()),
        "skip_tokenizer_init": True,
        "load_format": "auto" if adapter else "dummy",  # weights that come from the student are not read first
        "generation_config": "vllm",  # none but what is asked for
        "dtype": _DTYPES[settings.student.precision if vllm.dtype == "student" else vllm.dtype],
        "tensor_parallel_size": vllm.tensor,
        "max_model_len": limit,
        "max_num_seqs": settings.rollout.batch_rows,
        "gpu_memory_utilization": vllm.memory_share,
        "enforce_eager": vllm.eager,
        # A prefix computed by the last step's weights is of no use, and what is shared must not change a response.
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",  # of the model itself, temperature 1, nothing filtered
        "seed": 0,  # each request has its own
        "disable_log_stats": True,
    }
    if overrides:
        arguments["hf_overrides"] = dict(overrides)
    lora = settings.student.lora
    if adapter:
        rank = next(rank for rank in _LORA_RANKS if rank >= lora.rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if vllm.cache_bytes:
        arguments["kv_cache_memory_bytes"] = vllm.cache_bytes
    return Launch(
        python=os.path.expanduser(vllm.python),
        launcher=[word.replace("{replica}", str(replica)) for word in vllm.launcher],
        environment=server_environment(os.environ, devices),
        settings={
            "arguments": arguments,
            "interface": vllm.interface,
            "sleep": vllm.sleep,
            "adapter": {"r": lora.rank, "lora_alpha": lora.alpha} if adapter else None,
        },
        log=Path(settings.output).absolute() / LOGS / f"server-{replica}.log",
        address=vllm.address or socket.gethostname(),
        start_seconds=vllm.start_seconds,
        answer_seconds=vllm.answer_seconds,
    )


def _devices(ranks: ServerRanks, count: int) -> str | None:
    """The first GPUs of the replica on the machine of the rank that speaks. Collective over the replica."""
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = torch.cuda.current_device()
    mine = socket.gethostname(), visible.split(",")[index] if visible else str(index)
    told: list[tuple[str, str]] = [mine]
    if ranks.replica is not None:
        told = [mine] * dist.get_world_size(ranks.replica)
        dist.all_gather_object(told, mine, group=ranks.replica)
    return ",".join([device for host, device in told if host == told[0][0]][:count])
