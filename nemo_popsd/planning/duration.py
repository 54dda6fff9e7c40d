"""From operations and bytes to seconds. An estimate, never a measurement. Formulas: docs/planning.md, "Time"."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_popsd.planning import compute, traffic
from nemo_popsd.planning.memory import trained
from nemo_popsd.planning.parameters import count, stages
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds of one phase."""

    compute: float
    """Arithmetic; in decoding the slowest of arithmetic, reading weights and cache, and launching kernels."""
    communication: float
    """Collectives, transfers and copies from the host, as if nothing overlapped with them."""
    bubble: float
    """Waiting for other pipeline stages."""

    @property
    def total(self) -> float:
        """All of it."""
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
    """Whether the rollouts of the next step are generated meanwhile, on other GPUs."""

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
    # 1F1B: p − 1 of the m·v + p − 1 slots of a stage are empty; forwards alone fill and drain once.
    stages_waited = layout.pipeline - 1
    frozen = flops.frozen.needed / forward_rate
    trained_seconds = flops.training.needed / training_rate
    return StepSeconds(
        rollout=_rollout(case, moved),
        frozen=Seconds(
            frozen,
            _sent(case, moved.frozen) + moved.from_host / (hardware.host_gb_s * 1e9 * hardware.link_efficiency),
            frozen * stages_waited / case.frozen_forwards / layout.virtual_pipeline,
        ),
        training=Seconds(
            trained_seconds + case.updates * _update(case),
            _sent(case, moved.training),
            trained_seconds * stages_waited / case.microbatches / layout.virtual_pipeline,
        ),
        overlap=case.config.rollout.overlap and bool(case.config.rollout.vllm.launcher),
    )


def _rollout(case: Case, moved: traffic.StepTraffic) -> Seconds:
    """Batches one after the other; a token passes the stages one after the other."""
    hardware, layout, sizes, mean = case.plan.hardware, case.layout, case.sizes, case.means
    rows, length = case.decoded_rows, compute.attended(case)
    rate = _peak(case) * hardware.forward_efficiency
    cache = 2 * rows * length * sizes.key_width / layout.tensor * sizes.layers / layout.pipeline
    reading = (_weights_read(case) + cache) * case.element / (hardware.memory_gb_s * 1e9 * hardware.memory_efficiency)
    arithmetic = compute.decoding(case, rows, length).needed / rate
    launching = sizes.layers / layout.pipeline * hardware.layer_launch_us * 1e-6
    tokens = case.decoding_waves * mean.response
    busy = tokens * max(reading, arithmetic, launching) + compute.prefill(case).needed / rate
    calls = (2 * sizes.layers + 1 + traffic.sampling_calls(case)) * int(layout.tensor > 1) + layout.pipeline - 1
    sent = _sent(case, moved.rollout) + tokens * calls * hardware.latency_us * 1e-6
    return Seconds(busy, sent, (layout.pipeline - 1) * busy)


def _weights_read(case: Case) -> int:
    """Elements that a decoding step reads on one rank: all but the embedding, of which a token reads one vector."""
    sizes, layout, read = case.sizes, case.layout, 0
    for stage in stages(sizes, layout):
        parameters = count(sizes, layout, stage, case.config.student.lora if case.lora else None)
        embedding = parameters.vocabulary if stage.first and not (sizes.tied and stage.last) else 0
        read = max(read, parameters.all - embedding)
    return read


def _update(case: Case) -> float:
    """Reading and writing gradients, moments and weights once each."""
    hardware, layout = case.plan.hardware, case.layout
    touched = 0.0
    for stage in stages(case.sizes, layout):
        parameters = count(case.sizes, layout, stage, case.config.student.lora if case.lora else None)
        dense, experts = trained(case, parameters)
        if case.config.optimizer.distributed:
            touched = max(touched, dense / layout.dense_replicas + experts / layout.expert_replicas)
        else:
            touched = max(touched, float(dense + experts))
    return touched * (4 + 2 * 12 + case.element) / (hardware.memory_gb_s * 1e9 * hardware.memory_efficiency)


def _sent(case: Case, phase: traffic.Phase) -> float:
    hardware, layout = case.plan.hardware, case.layout
    seconds = 0.0
    for item in fields(phase):
        link = hardware.network_gb_s if layout.spans_nodes(item.name) else hardware.node_gb_s
        seconds += getattr(phase, item.name) / (link * 1e9 * hardware.link_efficiency)
    return seconds


def _peak(case: Case) -> float:
    hardware = case.plan.hardware
    return (hardware.bf16_tflops if case.element == 2 else hardware.fp32_tflops) * 1e12
