"""Bytes of a checkpoint of the run: in total, and the share of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_popsd.planning.memory import largest_trained, trained
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
    """What the rank that writes the most writes, see `StageShare`. With `training.async_save` it has as much host
    memory."""


@dataclass(frozen=True)
class StageShare:
    """Bytes of the weights and the optimizer state of a stage's ranks."""

    held: int
    """Of one rank's shards."""
    most: float
    """Most that one rank writes. Ranks with the same shards write about equal parts of them, in whole tensors."""


def stage_share(case: Case, stage: Stage) -> StageShare:
    """The shards of a stage, and how the ranks that have them divide them."""
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
