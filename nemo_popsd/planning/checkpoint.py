"""Bytes of a checkpoint of the run: in total, and the share of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_popsd.planning.memory import trained
from nemo_popsd.planning.parameters import Stage, count, padded_vocabulary, stages
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of the files, without the small ones."""

    weights: int
    """All weights, or those of the adapters; each once, with the vocabulary's padding."""
    state: int
    """Moments and, where the model is bf16, main weights, in fp32."""
    share: float
    """What one rank of the largest stage writes: ranks with the same weights write equal parts of them. With
    `training.async_save` it has as much host memory."""


def checkpoint_bytes(case: Case) -> CheckpointBytes:
    """The checkpoint of a run on its layout."""
    lora = case.config.student.lora if case.lora else None
    each = 12 if case.element == 2 else 8
    alone = replace(case.layout, tensor=1, sequence=False, pipeline=1, virtual_pipeline=1, context=1, expert=1)
    alone = replace(alone, first_stage_layers=0, last_stage_layers=0)
    whole = count(case.sizes, alone, Stage(case.sizes.layers, first=True, last=True), lora)
    trained_elements = sum(trained(case, whole))
    if not case.lora:
        matrices = 1 if case.sizes.tied else 2
        padded = padded_vocabulary(case.sizes, case.layout) * case.sizes.hidden
        trained_elements += matrices * (padded - whole.vocabulary)
    share = 0.0
    for stage in stages(case.sizes, case.layout):
        dense, experts = trained(case, count(case.sizes, case.layout, stage, lora))
        elements = dense / case.layout.dense_replicas + experts / case.layout.expert_replicas
        share = max(share, elements * (case.element + each))
    return CheckpointBytes(trained_elements * case.element, trained_elements * each, share)
