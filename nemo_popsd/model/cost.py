"""The cost of a step compared with its estimate: the planner's FLOPs divided by the measured seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.errors import UserError
from nemo_popsd.observability.metrics import CostMetrics, StepMetrics
from nemo_popsd.parallel.distributed import device, world_size
from nemo_popsd.planning import compute
from nemo_popsd.planning.config import PlanConfig, WorkloadConfig
from nemo_popsd.planning.plan import estimate
from nemo_popsd.planning.sizes import ModelSizes, read_sizes
from nemo_popsd.planning.workload import Case

PEAKS = {
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "B200": (2250.0, 75.0),
}
"""Dense peaks in TFLOP/s, in bf16 and fp32, by a substring of the device's name (data sheets)."""
PLANNED = "H100"
"""The device whose links and memory `popsd plan` assumes by default, so its seconds can be compared on this device."""


def step_cost(config: PopsdConfig) -> Callable[[StepMetrics, Sequence[PromptRow]], StepMetrics]:
    """Return `StepCost` for the device of this process; for a model unknown to the planner, the identity."""
    try:
        sizes, _ = read_sizes(config.student.source)
    except UserError:
        return lambda metrics, rows: metrics
    return StepCost(config, sizes, name=torch.cuda.get_device_name() if device().type == "cuda" else "")


class StepCost:
    """Adds metrics from the formulas of `popsd plan` to the measured metrics of each step."""

    def __init__(self, config: PopsdConfig, sizes: ModelSizes, *, name: str) -> None:
        """Store the references.

        Args:
            config: configuration of the run.
            sizes: sizes of its model.
            name: name of the device, as reported by CUDA; empty for a CPU.
        """
        self._config = config
        self._sizes = sizes
        self._bf16 = config.student.precision == "bf16"
        self._peak = next((peaks[not self._bf16] for part, peaks in PEAKS.items() if part in name), None)
        self._is_planned = PLANNED in name

    def __call__(self, metrics: StepMetrics, rows: Sequence[PromptRow]) -> StepMetrics:
        """Return the metrics with the cost for the mean lengths of the step. No collective.

        Args:
            metrics: metrics of the step.
            rows: rows of this rank; their prompts and references represent those of all ranks.
        """
        if not rows:
            return metrics
        workload = WorkloadConfig(
            prompt_tokens=round(fmean(len(row.contexts.student) for row in rows)),
            reference_tokens=round(fmean(len(row.contexts.reference) for row in rows)),
            response_tokens=max(1, round(metrics.response_tokens)),
        )
        case = self._case(workload)
        flops = compute.step(case)
        seconds = metrics.seconds_rollout + metrics.seconds_frozen + metrics.seconds_train
        needed = flops.frozen.needed + flops.training.needed
        everything = needed + (0.0 if self._config.rollout.overlap else flops.rollout.needed)
        predicted = estimate(case).seconds.total if self._is_planned else None
        cost = replace(
            metrics.cost or CostMetrics(),
            tokens_per_gpu=metrics.tokens_per_second / case.layout.world,
            tflops=needed / max(metrics.seconds_frozen + metrics.seconds_train, 1e-9) / 1e12,
            mfu=None if self._peak is None else everything / max(seconds, 1e-9) / (self._peak * 1e12),
            seconds_predicted=predicted,
            predicted_ratio=None if predicted is None else seconds / predicted,
        )
        return replace(metrics, cost=cost)

    def _case(self, workload: WorkloadConfig) -> Case:
        world = world_size()
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else world
        per_node = gpus if gpus and world % gpus == 0 else world
        plan = PlanConfig(gpus_per_node=per_node, workload=workload)
        return Case(self._config, plan, self._sizes, nodes=world // per_node, device=device().type)
