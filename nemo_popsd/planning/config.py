"""Settings of an estimate that are not part of the run's configuration: hardware, lengths, numbers of nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of

_POSITIVE = Bounds(1e-3, 1e9)
_SHARE = Bounds(1e-3, 1)


@dataclass(kw_only=True)
class HardwareConfig:
    """One GPU and its links. Defaults: an H100 SXM 80 GB in a DGX H100 (data sheet), and efficiencies of our choosing.

    The efficiencies were not measured by us: they are round numbers of the magnitude commonly reported for large-model
    training. Set them to the values that your own runs reach.
    """

    memory_gib: Annotated[float, _POSITIVE] = 79.6
    """Memory of one GPU, GiB (81,559 MiB, as the driver reports for an H100 SXM 80 GB)."""
    usable_memory: Annotated[float, _SHARE] = 0.92
    """Share of it that tensors may use; the rest is for the CUDA context, NCCL buffers and fragmentation. Ours."""
    bf16_tflops: Annotated[float, _POSITIVE] = 989.0
    """Dense bf16 peak, TFLOP/s (data sheet)."""
    fp32_tflops: Annotated[float, _POSITIVE] = 67.0
    """fp32 peak, TFLOP/s (data sheet); used if `student.precision` is fp32."""
    fp8_speedup: Annotated[float, Bounds(1, 4)] = 1.5
    """Speed of linears in FP8 relative to bf16, quantisation included; used for the passes of `fp8.*`. The ratio of
    the peaks is 2 (data sheet). Ours."""
    memory_gb_s: Annotated[float, _POSITIVE] = 3350.0
    """Bandwidth of the GPU's memory, GB/s (data sheet)."""
    node_gb_s: Annotated[float, _POSITIVE] = 450.0
    """Bandwidth to GPUs of the same node, one direction, GB/s (NVLink 4: 900 in both, data sheet)."""
    network_gb_s: Annotated[float, _POSITIVE] = 50.0
    """Bandwidth of one GPU to other nodes, one direction, GB/s (one 400 Gbit/s adapter per GPU, as in a DGX H100)."""
    host_gb_s: Annotated[float, _POSITIVE] = 64.0
    """Bandwidth from pinned host memory, one direction, GB/s (PCIe 5 x16)."""
    training_efficiency: Annotated[float, _SHARE] = 0.4
    """Share of the peak that forward and backward reach. Ours."""
    forward_efficiency: Annotated[float, _SHARE] = 0.5
    """Share of the peak that the frozen passes and the prefill reach. Ours."""
    memory_efficiency: Annotated[float, _SHARE] = 0.6
    """Share of the memory bandwidth that decoding reaches. Ours."""
    link_efficiency: Annotated[float, _SHARE] = 0.7
    """Share of a link's bandwidth that a collective or copy reaches. Ours."""
    layer_launch_us: Annotated[float, Bounds(0, 1e9)] = 200.0
    """Minimum time of one layer in one decoding step, microseconds, limited by kernel launches. Ours."""
    latency_us: Annotated[float, Bounds(0, 1e9)] = 20.0
    """Time of a small collective, microseconds; used for decoding. Ours."""

    def __post_init__(self) -> None:
        check_numbers(self, "hardware")


@dataclass(kw_only=True)
class WorkloadConfig:
    """Mean lengths of rows and responses. Memory is always planned for the limits of the run."""

    prompt_tokens: Annotated[int | None, Bounds(1, 10**7)] = None
    """Mean tokens of a student prompt; null means the limit, `data.max_prompt_tokens`."""
    reference_tokens: Annotated[int | None, Bounds(1, 10**7)] = None
    """Mean tokens of a reference; null means the limit, `data.max_reference_tokens`."""
    response_tokens: Annotated[int | None, Bounds(1, 10**7)] = None
    """Mean tokens of a response; null means the limit, `rollout.max_response_tokens`."""
    evaluation_tokens: Annotated[int | None, Bounds(1, 10**7)] = None
    """Mean tokens of a response in an evaluation; null means the limit, `evaluation.max_response_tokens`."""
    evaluation_problems: Annotated[int | None, Bounds(1, 10**9)] = None
    """Problems of an evaluation; null means those of the published sets in `evaluation.sets`, or
    `evaluation.problems`."""
    prompts_per_node: Annotated[int | None, Bounds(1, 2**16)] = None
    """Prompts per step and node, instead of `training.prompts_per_step` for all nodes; null uses the latter."""
    layers: str = "fused"
    """Kind of layers for which activations are planned: `fused`, Transformer Engine's (tests compare with the tensors
    that its modules keep, with emulated kernels), or `plain`, the local ones (tests compare with their allocations on a
    CPU). A run with `student.layers=local` always uses `plain`."""

    def __post_init__(self) -> None:
        check_numbers(self, "workload")
        one_of("workload.layers", self.layers, ("fused", "plain"))


@dataclass(kw_only=True)
class SimulationConfig:
    """Assumptions of `--simulate` and `--failures` in addition to those of the plan. The values are ours, not measured:
    set them to the values that your runs show.
    """

    steps: Annotated[int, Bounds(1, 10**4)] = 5
    """Number of simulated steps."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 1
    """Seed of the random lengths and failures."""
    length_spread: Annotated[float, Bounds(0, 3)] = 0.5
    """Standard deviation of the logarithm of response lengths: lengths are log-normal around
    `workload.response_tokens`, and truncated at `rollout.max_response_tokens`. With 0 all responses have the mean
    length."""
    slow_nodes: Annotated[int, Bounds(0, 10**5)] = 0
    """Number of nodes that compute slower than the others."""
    slowdown: Annotated[float, Bounds(1, 100)] = 1.2
    """Time of a slow node relative to that of a normal one."""
    node_mtbf_hours: Annotated[float, Bounds(1, 1e9)] = 20_000.0
    """Mean time between failures of one node, hours; nodes fail independently of each other."""
    requeue_seconds: Annotated[float, Bounds(0, 1e7)] = 600.0
    """Seconds from a failure until training continues: detection, queue, start, reading the checkpoint."""
    checkpoint_seconds: Annotated[float, Bounds(0, 1e6)] = 30.0
    """Seconds for which a save pauses training."""

    def __post_init__(self) -> None:
        check_numbers(self, "simulation")


@dataclass(kw_only=True)
class PlanConfig:
    """Settings of `popsd plan` that are not settings of a run."""

    nodes: Annotated[list[int], Bounds(1, 10**5)] = field(default_factory=lambda: [1])
    """Numbers of nodes to plan for; several numbers produce a table."""
    gpus_per_node: Annotated[int, Bounds(1, 1024)] = 8
    """GPUs per node."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """GPU and links."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """Mean lengths and number of prompts."""
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    """Spread of lengths, slow nodes, failures."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise UserError("plan", got="nodes=[]", need="at least one number of nodes", fix="set nodes=1")
        check_numbers(self)
