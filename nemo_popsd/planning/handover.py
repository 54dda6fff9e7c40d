"""Bytes of the weights that each vLLM server receives after an update."""

from __future__ import annotations

from nemo_popsd.planning.parameters import Stage, linears, published_parameters
from nemo_popsd.planning.workload import Case
from nemo_popsd.rollout.vllm.config import LORA_RANKS

_PARTS = {"linear_qkv": 3, "linear_fc1": 2}
"""Number of Hugging Face linears in one Megatron linear; each has a copy of the adapter's A."""


def sends_adapters(case: Case) -> bool:
    """Whether only adapters are sent if the source is a Hugging Face directory; otherwise all weights are sent."""
    student = case.config.student
    possible = case.lora and not case.sizes.experts and student.lora.rank <= LORA_RANKS[-1]
    return possible and case.config.rollout.vllm.lora != "merged"


def handed_over(case: Case, stage: Stage) -> int:
    """Bytes of the unsharded tensors of `stage` in the student's precision."""
    if not sends_adapters(case):
        return published_parameters(case.sizes, stage) * case.element
    lora = case.config.student.lora
    layer = sum(
        lora.rank * (_PARTS.get(linear.name, 1) * linear.inputs + linear.outputs)
        for linear in linears(case.sizes)
        if linear.name in lora.targets
    )
    return stage.layers * layer * case.element
