"""Rehearses the step of one rank: model, optimizer and step of the run on rows and responses of maximum length."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_popsd.checkpoint.completeness import expected_shapes
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.model_files import TENSOR_NAMES
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.contexts import Contexts
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.data.records import Record
from nemo_popsd.distillation.fusion import TILE_BYTES
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.training import build_weights
from nemo_popsd.parallel.distributed import initialize
from nemo_popsd.planning.handover import sends_adapters
from nemo_popsd.planning.workload import Case, Lengths
from nemo_popsd.rehearsal.checkpoint import CheckpointShare, checkpoint_share
from nemo_popsd.rehearsal.counters import Cost, Meter, MeteredStopwatch
from nemo_popsd.rehearsal.handover import Handover, adapter_shapes, lone_stage_of_model, of_stage, rehearse_handover
from nemo_popsd.rehearsal.peers import one_rank
from nemo_popsd.rehearsal.repeated import repeated_layers
from nemo_popsd.rehearsal.routing import balanced_routing
from nemo_popsd.rehearsal.stages import lone_stage
from nemo_popsd.rehearsal.storage_free import StorageFree, without_assigned_data
from nemo_popsd.rollout.engine import Rollout
from nemo_popsd.training.reading import ResponseReader
from nemo_popsd.training.step import OnPolicyStep
from nemo_popsd.training.trajectory import Trajectory

_TOKEN = 1
_MEASURED_STEP = 2
"""The measured step; the first one includes the self-check."""


@dataclass(frozen=True)
class Rehearsed:
    """Measured cost of the step of one rank."""

    rank: int
    """The rank."""
    kinds: dict[str, int]
    """Bytes between steps by kind: weights, gradients, optimizer and frozen copy."""
    phases: dict[str, Cost]
    """Cost by phase (frozen, train); there is no decoding."""
    checkpoint: CheckpointShare
    """The part of a checkpoint that the rank writes."""
    handover: Handover
    """The tensors that its stage contributes to the weights of a vLLM server."""

    @property
    def standing(self) -> int:
        """Total bytes between steps."""
        return sum(self.kinds.values())


UNREAD = ResponseReader(count_markers=lambda ids: 0, marked=lambda ids: [False] * len(ids), is_right=None)
"""Responses without text: no markers, no answers."""


class LongestRollouts:
    """Supplies responses of equal length for every row in place of an engine."""

    per_prompt = 1
    seconds_waiting = 0.0
    seconds_weights = 0.0

    def __init__(self, lengths: Lengths) -> None:
        """`lengths` of every row."""
        self._response = lengths.response

    def of(self, step: int, rows: Sequence[PromptRow]) -> list[Trajectory]:
        """A trajectory for each row."""
        count = self._response
        return [Trajectory(row, Rollout([_TOKEN] * count, [0.0] * count, True, step - 1)) for row in rows]


def rehearse(case: Case, model: Mapping[str, object], rank: int) -> Rehearsed:
    """Builds rank `rank` of the run and measures its second step, on rows of maximum length.

    Args:
        case: the run, see `as_rehearsed`, and its layout, which must divide.
        model: content of the model's ``config.json``.
        rank: global rank.

    Raises:
        UserError: the weights for vLLM differ from those of transformers.
    """
    config = case.config
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, one_rank(rank, case.layout.world):
        initialize(config.parallel, seed=config.seed)
        architecture = _without_weights(Path(folder), model)
        meter = Meter()
        with (
            _tiles_of_a_gpu(),
            lone_stage(meter.live.freed),
            repeated_layers(meter, overlap=config.optimizer.overlap_grad_reduce),
            balanced_routing(),
            without_assigned_data(),
            StorageFree() as mode,
            meter.measuring(),
        ):
            student = Student(
                architecture,
                config.student,
                config.parallel,
                seed=config.seed,
                load_initial=lambda chunks: None,
                megatron=config.megatron,
            )
            for chunk in student.chunks:
                mode.release(cast(torch.nn.Module, chunk))
            kinds = {"weights": meter.live.live}
            wrapped = student.wrap(config.optimizer)
            kinds["gradients"] = meter.live.live - sum(kinds.values())
            optimizer = StudentOptimizer(
                wrapped,
                config.optimizer,
                steps=config.training.steps * config.training.updates_per_step,
                bf16=config.student.precision == "bf16",
                fields=config.megatron.values("optimizer"),
            )
            _create_state(optimizer)
            kinds["optimizer"] = meter.live.live - sum(kinds.values())
            with student.base.model():
                kinds["frozen copy"] = meter.live.live - sum(kinds.values())
            step = OnPolicyStep(
                config.training,
                config.distillation,
                student,
                LongestRollouts(case.limits),
                UNREAD,
                build_weights(config.distillation, student),
                stopwatch=lambda: MeteredStopwatch(meter),
            )
            step(_MEASURED_STEP, _rows(case), optimizer, optimizer.step)
            share = checkpoint_share(student.chunks, optimizer.megatron, adapters=case.lora)
            handover = _handed_over(case, architecture, student)
        return Rehearsed(rank, kinds, dict(meter.phases), share, handover)


def _handed_over(case: Case, architecture: HuggingFaceModel, student: Student) -> Handover:
    adapters, expected = sends_adapters(case), expected_shapes(architecture.config)
    if adapters:
        expected = adapter_shapes(expected, case.config.student.lora)
    stream = architecture.stream_adapters if adapters else architecture.stream
    with lone_stage_of_model():
        here = of_stage(expected, student.chunks)
        return rehearse_handover(stream(student.chunks), here, adapters=adapters)


def as_rehearsed(config: PopsdConfig) -> PopsdConfig:
    """The configuration with uncompiled torch operations on local layers and without FP8, because compiled kernels and
    those of Transformer Engine need memory. Rows have no text, so they share no prefixes.
    """
    return replace(
        config,
        fp8=FP8Config(),
        student=replace(config.student, layers="local"),
        distillation=replace(config.distillation, fused="never"),
        rollout=replace(config.rollout, per_prompt=1),
        training=replace(config.training, share_prefixes="false"),
    )


def _tiles_of_a_gpu() -> AbstractContextManager[object]:
    """Context in which the loss uses the tile size of a GPU; with that of a CPU it has many times more operations."""
    return mock.patch.dict(TILE_BYTES, {("cpu", False): TILE_BYTES["cuda", False]})


def _without_weights(folder: Path, content: Mapping[str, object]) -> HuggingFaceModel:
    """A model directory with tensor names but no weights, as in a NeMo checkpoint."""
    fields = dict(content)
    family = str(fields.pop("model_type"))
    config = AutoConfig.for_model(family, **fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    config.save_pretrained(folder)
    (folder / TENSOR_NAMES).write_text(json.dumps(sorted(expected_shapes(config))))
    return HuggingFaceModel(folder)


def _create_state(optimizer: StudentOptimizer) -> None:
    """Creates the optimizer state by an update without a gradient, as the first step does."""
    optimizer.zero_grad()
    optimizer.prepare()
    optimizer.step()


def _rows(case: Case) -> list[PromptRow]:
    lengths = case.limits
    contexts = Contexts(
        [_TOKEN] * lengths.prompt,
        [_TOKEN] * (lengths.prompt + lengths.reference),
        [_TOKEN] * lengths.reference,
        "",
        False,
    )
    return [PromptRow(Record(id=str(number), question="?", reference="?"), contexts) for number in range(case.rows)]
