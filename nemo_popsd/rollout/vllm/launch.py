"""Builds a vLLM engine from the settings of a run: server arguments, LoRA, devices, groups of ranks.

Independent of Megatron: `ServedModel` describes the student.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.data.models import model_path
from nemo_popsd.errors import UserError
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.rollout.vllm.config import LORA_RANKS, VllmConfig
from nemo_popsd.rollout.vllm.engine import VllmEngine
from nemo_popsd.rollout.vllm.environment import server_environment
from nemo_popsd.rollout.vllm.ranks import ServerRanks
from nemo_popsd.rollout.vllm.supervisor import Launch, VllmServer

logger = logging.getLogger(__name__)

LOGS = "vllm"
"""Folder of the servers' logs in `output`."""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

WeightStream = Callable[[], Iterable[tuple[str, Tensor]]]
"""Names and full tensors, the same on every rank; iterating is collective."""


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Size and scale of the LoRA adapters."""

    rank: int
    """`student.lora.rank`."""
    alpha: float
    """`student.lora.alpha`."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Description of the student for a server."""

    source: str
    """`student.source`."""
    precision: str
    """`student.precision`."""
    lora: AdapterShape | None
    """Size and scale of the adapters; None under full fine-tuning."""
    has_experts: bool
    """Whether the student is a mixture of experts."""
    weights: WeightStream
    """All tensors under Hugging Face's names, adapters merged."""
    adapters: WeightStream
    """The adapters under PEFT's names."""
    write_files: Callable[[Path], object]
    """Writes ``config.json`` and the tokenizer files into a directory."""
    config_overrides: Mapping[str, object] = field(default_factory=dict)
    """Keys of ``config.json`` that replace those in the file."""


@dataclass(frozen=True)
class Replica:
    """The replica of the model to which this rank belongs."""

    index: int
    """Data-parallel rank; the server has the same index."""
    shares_experts: bool
    """Whether replicas share experts, so that the weights are gathered over the world."""


def build_vllm_engine(
    settings: RolloutConfig,
    model: ServedModel,
    replica: Replica,
    *,
    output: str | Path,
    timeout: timedelta,
    weights_version: Callable[[], int],
    longest: Callable[[], int],
    stop_requested: Callable[[], bool],
) -> VllmEngine:
    """The engine of this rank. Collective over the world; starts no server yet.

    Args:
        settings: the section `rollout`.
        model: the student.
        replica: replica of this rank.
        output: output directory of the run; logs are written below it.
        timeout: a rank that waits longer for the others fails.
        weights_version: returns the number of completed training steps.
        longest: returns the number of tokens of the longest expected sequence.
        stop_requested: see `StopSignals.while_decoding`.

    Raises:
        UserError: `rollout.vllm.lora=adapter` or `rollout.vllm.quantization` is not possible with this model.
    """
    vllm = settings.vllm
    output = Path(output)
    base = adapter_base(vllm, model)
    refuse_quantization(vllm, adapter=base is not None)
    ranks = server_ranks(replica, timeout=timeout)
    devices = None if vllm.launcher else _devices(ranks, vllm.tensor)
    return VllmEngine(
        ranks,
        start=lambda limit: VllmServer(
            server_launch(
                settings,
                model,
                base or _written_files(model, output / LOGS / f"model-{replica.index}"),
                output=output,
                limit=limit,
                replica=replica.index,
                devices=devices,
                adapter=base is not None,
            )
        ),
        weights=model.weights if base is None else model.adapters,
        content="weights" if base is None else "adapter",
        weights_version=weights_version,
        longest=longest,
        bucket_bytes=vllm.bucket_bytes,
        restarts=vllm.restarts,
        sleep=vllm.sleep,
        stop_requested=stop_requested,
    )


def server_ranks(replica: Replica, *, timeout: timedelta) -> ServerRanks:
    """Process groups of this rank's replica and of the ranks that gather weights together. Collective over the world.

    Args:
        replica: replica of this rank.
        timeout: a rank that waits longer for the others fails.
    """
    if dist.get_world_size() == 1:
        return ServerRanks(replica=None, domain=None, index=replica.index)
    indices: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(indices, replica.index)
    members: dict[int, list[int]] = defaultdict(list)
    for rank, index in enumerate(indices):
        members[index].append(rank)
    groups: dict[int, dist.ProcessGroup] = {
        index: dist.new_group(ranks, backend="gloo", timeout=timeout) for index, ranks in sorted(members.items())
    }
    own = groups[replica.index] if len(members[replica.index]) > 1 else None
    domain = own
    if replica.shares_experts:
        domain = dist.new_group(list(range(len(indices))), backend="gloo", timeout=timeout)
    return ServerRanks(replica=own, domain=domain, index=replica.index)


def adapter_base(settings: VllmConfig, model: ServedModel) -> Path | None:
    """Directory from which vLLM reads the base if only the adapters are sent to it; None if all weights are sent.

    Merged weights are rounded to vLLM's precision. In bf16 this drops changes smaller than 1/512 of a weight, so the
    rollouts would not show the effect of adapters after few steps.

    Raises:
        UserError: `rollout.vllm.lora=adapter` is not possible with this model.
    """
    if model.lora is None or settings.lora == "merged":
        return None
    path = model_path(model.source)
    obstacle = ""
    if model.has_experts:
        obstacle = "a model with experts"
    elif model.lora.rank > LORA_RANKS[-1]:
        obstacle = f"student.lora.rank={model.lora.rank}"
    elif not any(path.glob("*.safetensors")):
        obstacle = f"student.source={model.source!r}, which is not a Hugging Face directory"
    if not obstacle:
        return path
    if settings.lora == "adapter":
        raise UserError(
            "configuration",
            got=f"rollout.vllm.lora=adapter with {obstacle}",
            need=f"a dense model in a Hugging Face directory, and a rank of at most {LORA_RANKS[-1]}",
            fix="set rollout.vllm.lora=merged",
        )
    logger.warning("vLLM gets the adapters merged into weights, rounded to its precision: %s", obstacle)
    return None


def refuse_quantization(settings: VllmConfig, *, adapter: bool) -> None:
    """Refuses `rollout.vllm.quantization` if weights are sent, or if there is no GPU.

    vLLM replaces the weight of a linear with its quantised transpose after loading, so bf16 weights that arrive later
    no longer fit (`vllm.model_executor.layers.quantization.fp8.Fp8LinearMethod.process_weights_after_loading`).

    Args:
        settings: the section `rollout.vllm`.
        adapter: whether only the adapters are sent.

    Raises:
        UserError: the message names the missing condition.
    """
    if settings.quantization == "none":
        return
    need, fix = "", ""
    if not adapter:
        need = "a base that does not change, to which adapters are sent: vLLM quantises weights when it reads them"
        fix = "set student.adaptation=lora and rollout.vllm.lora=adapter"
    elif not settings.launcher and not torch.cuda.is_available():
        need, fix = "a GPU", "run on a GPU"
    if need:
        got = f"rollout.vllm.quantization={settings.quantization}"
        raise UserError("configuration", got=got, need=need, fix=f"{fix}, or set rollout.vllm.quantization=none")


def server_launch(
    settings: RolloutConfig,
    model: ServedModel,
    directory: Path,
    *,
    output: Path,
    limit: int,
    replica: int,
    devices: str | None,
    adapter: bool,
) -> Launch:
    """Command and settings to start the server of a replica.

    Args:
        settings: the section `rollout`.
        model: the student.
        directory: directory with the ``config.json``.
        output: output directory of the run.
        limit: number of tokens of the longest sequence.
        replica: index of the replica.
        devices: GPUs of the server; None leaves the choice to the environment.
        adapter: whether the server reads the weights from `directory` and is sent LoRA adapters; otherwise it is sent
            all weights.
    """
    vllm = settings.vllm
    arguments: dict[str, object] = {
        "model": str(directory.absolute()),
        "skip_tokenizer_init": True,
        "load_format": "auto" if adapter else "dummy",  # weights that the student sends are not read from files first
        "generation_config": "vllm",  # no sampling defaults of the model
        "dtype": _DTYPES[model.precision if vllm.dtype == "student" else vllm.dtype],
        "tensor_parallel_size": vllm.tensor,
        "max_model_len": limit,
        "max_num_seqs": settings.batch_rows,
        "gpu_memory_utilization": vllm.memory_share,
        "enforce_eager": vllm.eager,
        # A prefix computed with the weights of the last step is stale, and sharing must not change a response.
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",  # of the model itself: temperature 1, nothing filtered
        "seed": 0,  # each request has its own
        "disable_log_stats": True,
    }
    if vllm.quantization != "none":
        arguments["quantization"] = vllm.quantization
    if model.config_overrides:
        arguments["hf_overrides"] = dict(model.config_overrides)
    lora = model.lora if adapter else None
    if lora is not None:
        rank = next(rank for rank in LORA_RANKS if rank >= lora.rank)
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
            "adapter": None if lora is None else {"r": lora.rank, "lora_alpha": lora.alpha},
        },
        log=output.absolute() / LOGS / f"server-{replica}.log",
        address=vllm.address or socket.gethostname(),
        start_seconds=vllm.start_seconds,
        answer_seconds=vllm.answer_seconds,
    )


def _written_files(model: ServedModel, directory: Path) -> Path:
    """Writes the model files into the run's own directory. Their original directory may be a superseded checkpoint,
    which may have been removed when a server restarts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.write_files(directory)
    return directory


def _devices(ranks: ServerRanks, count: int) -> str | None:
    """The first `count` GPUs of the replica on the machine of its leader. Collective over the replica."""
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = torch.cuda.current_device()
    own = socket.gethostname(), visible.split(",")[index] if visible else str(index)
    gathered: list[tuple[str, str]] = [own]
    if ranks.replica is not None:
        gathered = [own] * dist.get_world_size(ranks.replica)
        dist.all_gather_object(gathered, own, group=ranks.replica)
    return ",".join([device for host, device in gathered if host == gathered[0][0]][:count])
