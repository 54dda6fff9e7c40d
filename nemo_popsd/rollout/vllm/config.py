"""Configuration of the vLLM server that draws rollouts when `rollout.engine` is `vllm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of

INTERFACES = ("auto", "weight-transfer", "worker-extension")


@dataclass(kw_only=True)
class VllmConfig:
    """One server for each data-parallel replica, in an environment of its own."""

    python: Annotated[str, Text.PATH] = ".vllm-venv/bin/python"
    """Python of the environment that has vLLM 0.14.1 or newer; `make vllm-env` makes one for CPUs."""
    launcher: list[str] = field(default_factory=list)
    """Command put before it, to start the server elsewhere, e.g. `[srun, --overlap, --nodes=1, --nodelist=node7]`;
    `{replica}` stands for the number of the replica. Python, this package and the student's files must be found there
    under the same paths. Without it the server shares machine and GPUs with the replica."""
    address: str = ""
    """Address under which a server started by `launcher` reaches the trainer; empty takes the host's name."""
    tensor: Annotated[int, Bounds(1, 4096)] = 1
    """Tensor-parallel size of the server; without `launcher` at most the replica's ranks, whose GPUs it uses."""
    dtype: str = "student"
    """`student` takes that of `student.precision`; otherwise `bf16`, `fp16` or `fp32`."""
    memory_share: Annotated[float, Bounds(1e-3, 1)] = 0.4
    """Share of each GPU's memory for weights and key-value cache (vLLM's gpu_memory_utilization); on CPUs of the
    machine's memory."""
    cache_bytes: Annotated[int, Bounds(0, 2**50)] = 0
    """Exact size of the key-value cache on each GPU; 0 leaves what `memory_share` has beside the weights."""
    eager: bool = False
    """Without compilation and CUDA graphs: starts sooner, decodes more slowly."""
    sleep: bool = True
    """Give the GPU's memory back between rollouts; on CPUs there is nothing to give back."""
    bucket_bytes: Annotated[int, Bounds(1, 2**50)] = 268435456
    """Weights travel in buckets of at most this size, or of the largest tensor, if that is larger."""
    start_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 900
    """A server that is not ready after this long is lost: it is ended and another is started."""
    answer_seconds: Annotated[float, Bounds(0, SECONDS_OF_30_DAYS, above=True)] = 3600
    """A server that has not answered after this long is lost: another is started and asked again."""
    restarts: Annotated[int, Bounds(0, 10**4)] = 2
    """Times that a lost server, one that died while it loaded included, is started again before the rollouts of a step
    are given up."""
    lora: str = "auto"
    """How LoRA gets into vLLM: `adapter` sends the adapters alone and has vLLM compute them beside the base that it
    reads from `student.source`, as training does; `merged` sends all weights with the adapters in them, rounded to
    `dtype`. `auto` takes `adapter` where it can: a dense model, a Hugging Face directory, a rank of at most 512."""
    interface: str = "auto"
    """How whole weights get into vLLM: `weight-transfer` or `worker-extension`; `auto` takes the first that the
    installed version has (see `nemo_popsd/rollout/vllm/serving/popsd_interfaces.py`)."""

    def __post_init__(self) -> None:
        check_numbers(self, "rollout.vllm")
        one_of("rollout.vllm.dtype", self.dtype, ("student", "bf16", "fp16", "fp32"))
        one_of("rollout.vllm.lora", self.lora, ("auto", "adapter", "merged"))
        one_of("rollout.vllm.interface", self.interface, INTERFACES)
