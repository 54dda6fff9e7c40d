"""Converts operations and bytes to seconds: an estimate, not a measurement. Formulas: docs/planning.md, "Time"."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_popsd.planning import compute, fp8, traffic
from nemo_popsd.planning.memory import trained
from nemo_popsd.planning.parameters import count, stages
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds of one phase."""

    compute: float
    """Arithmetic; in decoding the maximum of arithmetic, reading weights and cache, and launching kernels."""
    communication: float
    """Collectives, transfers and copies from the host, without the part that overlaps with arithmetic."""
    bubble: float
    """Waiting for other pipeline stages."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.compute + self.communication + self.bubble


@dataclass(frozen=True)
class StepSeconds:
    """Estimated seconds of one step."""

    rollout: Seconds
    """Prefill and decoding of the responses."""
    frozen: Seconds
    """Frozen passes."""
    training: Seconds
    """Forward, backward, reduction, update."""
    overlap: bool = False
    """Whether the rollouts of the next step are generated at the same time, on other GPUs."""
    reduction: float = 0.0
    """Part of the training's communication between data-parallel ranks that does not overlap."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        after_rollout = self.frozen.total + self.training.total
        return max(self.rollout.total, after_rollout) if self.overlap else self.rollout.total + after_rollout


def step(case: Case, flops: compute.StepFlops, moved: traffic.StepTraffic) -> StepSeconds:
    """Estimated seconds of one step with these operations and bytes."""
    hardware, layout = case.plan.hardware, case.layout
    forward_rate = _peak(case) * hardware.forward_efficiency
    training_rate = _peak(case) * hardware.training_efficiency
    # 1F1B: p − 1 of the m·v + p − 1 slots of a stage are empty; forward-only passes fill and drain once.
    stages_waited = layout.pipeline - 1
    frozen = fp8.equivalent(case, flops.frozen, "frozen") / forward_rate
    trained_seconds = fp8.equivalent(case, flops.training, "training") / training_rate
    hidden_reduction = _hidden_reduction(case, moved, trained_seconds)
    hidden = hidden_reduction + _hidden_transfers(case, moved, trained_seconds)
    return StepSeconds(
        rollout=rollout(case, moved),
        frozen=Seconds(
            frozen,
            _sent(case, moved.frozen) + moved.from_host / (hardware.host_gb_s * 1e9 * hardware.link_efficiency),
            frozen * stages_waited / case.frozen_forwards / layout.virtual_pipeline,
        ),
        training=Seconds(
            trained_seconds + case.updates * _update(case),
            _sent(case, moved.training) - hidden,
            trained_seconds * stages_waited / case.microbatches / layout.virtual_pipeline,
        ),
        overlap=case.config.rollout.overlap and bool(case.config.rollout.vllm.launcher),
        reduction=_seconds(case, "data", moved.training.data) - hidden_reduction,
    )


def rollout(case: Case, moved: traffic.StepTraffic) -> Seconds:
    """Prefill and decoding: batches run one after the other, and a token passes the stages one after the other."""
    hardware, layout, sizes, mean = case.plan.hardware, case.layout, case.sizes, case.means
    rows, length = case.decoded_rows, compute.attended(case)
    rate = _peak(case) * hardware.forward_efficiency
    cache = 2 * rows * length * sizes.key_width / layout.tensor * sizes.layers / layout.pipeline
    read = (_weights_read(case) + cache) * case.element - fp8.saved_reading(case)
    reading = read / (hardware.memory_gb_s * 1e9 * hardware.memory_efficiency)
    arithmetic = fp8.equivalent(case, compute.decoding(case, rows, length), "rollouts") / rate
    launching = sizes.layers / layout.pipeline * hardware.layer_launch_us * 1e-6
    tokens = case.decoding_waves * mean.response
    prefill = fp8.equivalent(case, compute.prefill(case), "rollouts") / rate
    busy = tokens * max(reading, arithmetic, launching) + prefill
    calls = (2 * sizes.layers + 1 + traffic.sampling_calls(case)) * int(layout.tensor > 1) + layout.pipeline - 1
    sent = _sent(case, moved.rollout) + tokens * calls * hardware.latency_us * 1e-6
    return Seconds(busy, sent, (layout.pipeline - 1) * busy)


def _weights_read(case: Case) -> int:
    """Elements that a decoding step reads on one rank: all but the embedding, from which a token reads one vector."""
    sizes, layout, read = case.sizes, case.layout, 0
    for stage in stages(sizes, layout):
        parameters = count(sizes, layout, stage, case.config.student.lora if case.lora else None)
        embedding = parameters.vocabulary if stage.first and not (sizes.tied and stage.last) else 0
        read = max(read, parameters.all - embedding)
    return read


def _update(case: Case) -> float:
    """Seconds to read and write gradients, moments and weights once each; for the share on the host, to send gradients
    there and weights back. The arithmetic of the host is not counted.
    """
    hardware, layout, share = case.plan.hardware, case.layout, case.config.optimizer.host_share
    touched = 0.0
    for stage in stages(case.sizes, layout):
        parameters = count(case.sizes, layout, stage, case.config.student.lora if case.lora else None)
        dense, experts = trained(case, parameters)
        if case.shards_state:
            touched = max(touched, dense / layout.dense_replicas + experts / layout.expert_replicas)
        else:
            touched = max(touched, float(dense + experts))
    state = 2 * (8 if case.config.optimizer.state_dtype == "bf16" else 12)
    on_device = touched * (1 - share) * (case.gradient_element + state + case.element)
    sent = touched * share * (case.gradient_element + case.element)
    return on_device / (hardware.memory_gb_s * 1e9 * hardware.memory_efficiency) + sent / (
        hardware.host_gb_s * 1e9 * hardware.link_efficiency
    )


def _hidden_reduction(case: Case, moved: traffic.StepTraffic, computing: float) -> float:
    """Seconds of data-parallel communication that overlap with `computing` seconds of arithmetic.

    A backward pass takes two thirds of the arithmetic. Gradients are reduced during the last backward pass of an
    update; weights are gathered during the first forward pass of the next update in the step.
    """
    optimizer, updates = case.config.optimizer, case.updates
    microbatch = computing / updates / case.microbatches
    gathered = moved.weight_gather / updates
    reduced = (moved.training.data - moved.weight_gather) / updates
    hidden = 0.0
    if optimizer.overlap_grad_reduce:
        hidden += updates * min(_seconds(case, "data", reduced), microbatch * 2 / 3)
    if optimizer.overlap_param_gather:
        hidden += (updates - 1) * min(_seconds(case, "data", gathered), microbatch / 3)
    return hidden


def _hidden_transfers(case: Case, moved: traffic.StepTraffic, computing: float) -> float:
    """Seconds of transfers between stages that overlap with arithmetic."""
    if not case.layout.overlap_transfers:
        return 0.0
    return min(_seconds(case, "pipeline", moved.training.pipeline), computing)


def _sent(case: Case, phase: traffic.Phase) -> float:
    return sum(_seconds(case, item.name, getattr(phase, item.name)) for item in fields(phase))


def _seconds(case: Case, dimension: str, sent: float) -> float:
    """Seconds to send this many bytes in a group of `dimension`."""
    hardware = case.plan.hardware
    link = hardware.network_gb_s if case.layout.spans_nodes(dimension) else hardware.node_gb_s
    return sent / (link * 1e9 * hardware.link_efficiency)


def _peak(case: Case) -> float:
    hardware = case.plan.hardware
    return (hardware.bf16_tflops if case.element == 2 else hardware.fp32_tflops) * 1e12
