"""FP8 in the plan: bytes of quantised weights, and the speed-up of linears. Formulas: docs/planning.md, "FP8"."""

from __future__ import annotations

from nemo_popsd.megatron.config import FP8_MULTIPLES
from nemo_popsd.planning.compute import Flops
from nemo_popsd.planning.parameters import Stage, linears, stages
from nemo_popsd.planning.workload import Case


def misfits_of_fp8(case: Case) -> list[str]:
    """Why `fp8.*` is impossible with this model and layout; empty if it is possible or off."""
    fp8, tensor = case.config.fp8, case.layout.tensor
    if not fp8.passes:
        return []
    if case.sizes.experts:
        return [f"{fp8.passes[0]}=true needs a dense model"]
    multiple, found = FP8_MULTIPLES[fp8.recipe], []
    for linear in linears(case.sizes):
        inputs, outputs = (
            (linear.inputs, linear.outputs // tensor)
            if linear.splits_outputs
            else (linear.inputs // tensor, linear.outputs)
        )
        if inputs % multiple or outputs % multiple:
            found.append(
                f"{linear.name} of {inputs} x {outputs} on a rank is not a multiple of {multiple}, as needed for "
                f"fp8.recipe={fp8.recipe}"
            )
    return found


def quantised_elements(case: Case, stage: Stage) -> float:
    """Weights of the linears of one stage on a rank, without those of the first and last layers that stay in bf16."""
    fp8 = case.config.fp8
    layers = stage.layers
    layers -= fp8.num_layers_at_start_in_bf16 if stage.first else 0
    layers -= fp8.num_layers_at_end_in_bf16 if stage.last else 0
    return max(0, layers) * sum(linear.share(case.layout.tensor) for linear in linears(case.sizes))


def quantised_bytes(case: Case, stage: Stage) -> float:
    """Bytes of the quantised weights that Transformer Engine keeps in addition to those in bf16.

    One byte per weight of a model that computes in FP8, two if it is trained in FP8, because the backward pass needs
    the transpose. Under full fine-tuning the frozen copy has its own. Scales and their histories are less than 1 %.
    """
    fp8 = case.config.fp8
    live = 2 if fp8.training else int(fp8.rollouts or (fp8.frozen and case.lora))
    copy = int(fp8.frozen and not case.lora)
    return (live + copy) * quantised_elements(case, stage)


def saved_reading(case: Case) -> float:
    """Bytes that a decoding step saves with `fp8.rollouts` when reading weights, on the stage that saves the fewest."""
    if not case.config.fp8.rollouts:
        return 0.0
    return min(quantised_elements(case, stage) for stage in stages(case.sizes, case.layout)) * (case.element - 1)


def equivalent(case: Case, flops: Flops, passes: str) -> float:
    """bf16 operations that take as long as `flops` of the given passes: `frozen`, `rollouts` or `training`.

    Linears take 1 / `hardware.fp8_speedup` of the time, adapters included; attention and output matrix stay in bf16.
    """
    if not getattr(case.config.fp8, passes):
        return flops.needed
    share = 1 - case.config.fp8.layers_in_bf16 / case.sizes.layers
    return flops.needed - flops.linear * share * (1 - 1 / case.plan.hardware.fp8_speedup)
