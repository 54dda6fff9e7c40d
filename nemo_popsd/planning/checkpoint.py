"""Bytes of a checkpoint of the run: the total, and the largest part of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_popsd.planning.memory import largest_trained, trained
from nemo_popsd.planning.parameters import Stage, count, padded_vocabulary, stages
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of the files of a checkpoint, without small ones."""

    weights: int
    """Bytes of all weights, or of the adapters under LoRA, each counted once, including vocabulary padding."""
    state: int
    """Bytes of moments and, for a bf16 model, main weights, in fp32."""
    share: float
    """Bytes that the busiest rank writes, see `StageShare`. With `training.async_save` it needs the same amount of host
    memory."""


@dataclass(frozen=True)
class StageShare:
    """Bytes of weights and optimizer state for the ranks of a stage."""

    held: int
    """Bytes of the shards of one rank."""
    most: float
    """Largest number of bytes that one rank writes. Ranks with the same shards write parts of about equal size, in
    whole tensors."""


def stage_share(case: Case, stage: Stage) -> StageShare:
    """The shards of a stage, and how the ranks that hold them divide them."""
    parameters = count(case.sizes, case.layout, stage, case.config.student.lora if case.lora else None)
    dense, experts = trained(case, parameters)
    if case.sizes.tied and stage.last and not stage.first and not case.lora:
        dense -= parameters.vocabulary  # the first stage writes the embedding, of which this one has a copy
    each = case.element + _state_element(case)
    elements = dense / case.layout.dense_replicas + experts / case.layout.expert_replicas
    return StageShare((dense + experts) * each, max(elements, largest_trained(case, stage, parameters)) * each)


def _state_element(case: Case) -> int:
    """Bytes of optimizer state of one trained element."""
    return 12 if case.element == 2 else 8


def checkpoint_bytes(case: Case) -> CheckpointBytes:
    """The checkpoint of a run on its layout."""
    lora = case.config.student.lora if case.lora else None
    alone = replace(case.layout, tensor=1, sequence=False, pipeline=1, virtual_pipeline=1, context=1, expert=1)
    alone = replace(alone, first_stage_layers=0, last_stage_layers=0)
    whole = count(case.sizes, alone, Stage(case.sizes.layers, first=True, last=True), lora)
    trained_elements = sum(trained(case, whole))
    if not case.lora:
        matrices = 1 if case.sizes.tied else 2
        padded = padded_vocabulary(case.sizes, case.layout) * case.sizes.hidden
        trained_elements += matrices * (padded - whole.vocabulary)
    share = max(stage_share(case, stage).most for stage in stages(case.sizes, case.layout))
    return CheckpointBytes(trained_elements * case.element, trained_elements * _state_element(case), share)
