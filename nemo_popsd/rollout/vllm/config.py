"""Configuration of the vLLM server that draws rollouts when `rollout.engine` is `vllm`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_popsd.config.checks import above, at_least, fraction, one_of

INTERFACES = ("auto", "weight-transfer", "worker-extension")


@dataclass(kw_only=True)
class VllmConfig:
    """One server for each data-parallel replica, in an environment of its own."""

    python: str = ".vllm-venv/bin/python"
    """Python of the environment that has vLLM 0.14.1 or newer; `make vllm-env` makes one for CPUs."""
    launcher: list[str] = field(default_factory=list)
    """Command put before it, to start the server elsewhere, e.g. `[srun, --overlap, --nodes=1, --nodelist=node7]`;
    `{replica}` stands for the number of the replica. Python, this package and the student's files must be found there
    under the same paths. Without it the server shares machine and GPUs with the replica."""
    address: str = ""
    """Address under which a server started by `launcher` reaches the trainer; empty takes the host's name."""
    tensor: int = 1
    """Tensor-parallel size of the server; without `launcher` at most the replica's ranks, whose GPUs it uses."""
    dtype: str = "student"
    """`student` takes that of `student.precision`; otherwise `bf16`, `fp16` or `fp32`."""
    memory_share: float = 0.4
    """Share of each GPU's memory for weights and key-value cache (vLLM's gpu_memory_utilization); on CPUs of the
    machine's memory."""
    cache_bytes: int = 0
    """Exact size of the key-value cache on each GPU; 0 leaves what `memory_share` has beside the weights."""
    eager: bool = False
    """Without compilation and CUDA graphs: starts sooner, decodes more slowly."""
    sleep: bool = True
    """Give the GPU's memory back between rollouts; on CPUs there is nothing to give back."""
    bucket_bytes: int = 268435456
    """Weights travel in buckets of at most this size, or of the largest tensor, if that is larger."""
    start_seconds: float = 900
    """A server that is not ready after this long is lost: it is ended and another is started."""
    answer_seconds: float = 3600
    """A server that has not answered after this long is lost: it is started anew and asked again."""
    restarts: int = 2
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
        at_least("rollout.vllm.tensor", self.tensor, 1)
        one_of("rollout.vllm.dtype", self.dtype, ("student", "bf16", "fp16", "fp32"))
        fraction("rollout.vllm.memory_share", self.memory_share, allow_zero=False)
        at_least("rollout.vllm.cache_bytes", self.cache_bytes, 0)
        above("rollout.vllm.bucket_bytes", self.bucket_bytes, 0)
        above("rollout.vllm.start_seconds", self.start_seconds, 0)
        above("rollout.vllm.answer_seconds", self.answer_seconds, 0)
        at_least("rollout.vllm.restarts", self.restarts, 0)
        one_of("rollout.vllm.lora", self.lora, ("auto", "adapter", "merged"))
        one_of("rollout.vllm.interface", self.interface, INTERFACES)
