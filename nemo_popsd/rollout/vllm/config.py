"""Configuration of the vLLM server that generates rollouts when `rollout.engine` is `vllm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of max_lora_rank that vLLM accepts."""
INTERFACES = ("auto", "weight-transfer", "worker-extension")


@dataclass(kw_only=True)
class VllmConfig:
    """The vLLM servers, one per data-parallel replica, in their own Python environment."""

    python: Annotated[str, Text.PATH] = ".vllm-venv/bin/python"
    """Python of an environment with vLLM 0.14.1 or newer; `make vllm-env` creates one for CPUs."""
    launcher: list[str] = field(default_factory=list)
    """Command prefix that starts the server on another machine, e.g. `[srun, --overlap, --nodes=1, --nodelist=node7]`;
    `{replica}` is replaced by the replica's index. Python, this package and the student's files must have the same
    paths on that machine. Without a launcher the server shares machine and GPUs with the replica."""
    address: str = ""
    """Address at which a server started by `launcher` reaches the trainer; empty uses the host name."""
    tensor: Annotated[int, Bounds(1, 4096)] = 1
    """Tensor-parallel size of the server; without `launcher` at most the number of ranks of the replica, whose GPUs it
    uses."""
    dtype: str = "student"
    """`student` uses `student.precision`; otherwise `bf16`, `fp16` or `fp32`."""
    quantization: str = "none"
    """`none`, or the method by which vLLM quantises the linears of the base when it loads them, as named by the
    installed version: `fp8_per_tensor` or `fp8_per_block`; `fp8` in versions without these. Needs a GPU, and LoRA with
    a transfer of only the adapters, so that the quantised weights never change. The log-probabilities of rollouts are
    those of the quantised model."""
    memory_share: Annotated[float, Bounds(1e-3, 1)] = 0.4
    """Share of each GPU's memory for weights and key-value cache (vLLM's gpu_memory_utilization); on CPUs, share of the
    machine's memory."""
    cache_bytes: Annotated[int, Bounds(0, 2**50)] = 0
    """Exact size of the key-value cache on each GPU; 0 uses the part of `memory_share` that the weights leave."""
    eager: bool = False
    """Disable compilation and CUDA graphs: the server starts faster and decodes more slowly."""
    sleep: bool = True
    """Release GPU memory between rollouts; no effect on CPUs."""
    bucket_bytes: Annotated[int, Bounds(1, 2**50)] = 268435456
    """Maximum size of the buckets in which weights are sent; a larger tensor has its own bucket."""
    start_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 900
    """A server that is not ready after this time counts as lost: it is stopped, and another one is started."""
    answer_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 3600
    """A server that has not answered after this time counts as lost: another one is started and receives the requests
    again."""
    restarts: Annotated[int, Bounds(0, 10**4)] = 2
    """Number of times that a lost server, including one that died while loading, is restarted before the run fails at
    this step."""
    lora: str = "auto"
    """How LoRA is transferred to vLLM: `adapter` sends only the adapters, and vLLM applies them to the base that it
    reads from `student.source`, as training does; `merged` sends all weights with the adapters merged into them,
    rounded to `dtype`. `auto` uses `adapter` if possible: for a dense model, a Hugging Face directory, and a rank of at
    most 512."""
    interface: str = "auto"
    """How full weights are transferred to vLLM: `weight-transfer` or `worker-extension`; `auto` uses the first that the
    installed version has (see `nemo_popsd/rollout/vllm/serving/popsd_interfaces.py`)."""

    def __post_init__(self) -> None:
        check_numbers(self, "rollout.vllm")
        one_of("rollout.vllm.dtype", self.dtype, ("student", "bf16", "fp16", "fp32"))
        one_of("rollout.vllm.quantization", self.quantization, ("none", "fp8", "fp8_per_tensor", "fp8_per_block"))
        one_of("rollout.vllm.lora", self.lora, ("auto", "adapter", "merged"))
        one_of("rollout.vllm.interface", self.interface, INTERFACES)
