"""Weights of frozen branches that follow the student: the live weights, their moving average, or a snapshot.

A moving average or snapshot is a second copy of only the trained weights: of the adapters under LoRA, of all weights
under full fine-tuning. It replaces the weights in the student's model for a forward pass without gradient, so no second
model is built. Values are fp32: in bf16 an average with a decay near 1 would not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_popsd.distillation.config import WeightsConfig
from nemo_popsd.megatron.base import FrozenBase
from nemo_popsd.megatron.forward import output_weight
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.vocabulary import mean_output_vector


class LiveWeights:
    """The live student; a `FrozenBase` whose weights change with every update."""

    def __init__(self, student: Sequence[ModelChunk]) -> None:
        self._student = list(student)

    @contextmanager
    def model(self) -> Iterator[list[ModelChunk]]:
        """The student's chunks."""
        yield self._student


class MovingCopy:
    """A second copy of the student's trained weights; a `FrozenBase` that `follow` updates.

    Attributes:
        values: fp32 values by parameter, as shards of this rank.
    """

    def __init__(self, student: Sequence[ModelChunk], settings: WeightsConfig, *, on_host: bool = False) -> None:
        """Copies the current trained weights, which in a new run are those of the base.

        Args:
            student: chunks of the live model.
            settings: how the copy follows.
            on_host: keep the values in (pinned) host memory; `model` copies them to the device once per use.
        """
        self._student, self._settings = list(student), settings
        trained = [p for chunk in student for p in chunk.parameters() if p.requires_grad]
        self.values: dict[nn.Parameter, Tensor] = {}
        for parameter in dict.fromkeys(trained):
            value = parameter.detach().to(torch.float32, copy=True)
            if on_host and value.is_cuda:
                value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
            self.values[parameter] = value

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After training step `step`, every `settings.every` steps: average ← decay·average + (1 − decay)·weights, or
        copies the weights. Elementwise on this rank's shards; no collective.
        """
        if step % self._settings.every:
            return
        decay = self._settings.decay if self._settings.weights == "ema" else 0.0
        for parameter, value in self.values.items():
            live = parameter.detach().to(value.device, torch.float32)
            value.copy_(live) if decay == 0 else value.mul_(decay).add_(live, alpha=1 - decay)

    @contextmanager
    def model(self) -> Iterator[list[ModelChunk]]:
        """The student's chunks with the copy in place of their trained weights, rounded to the model's dtype."""
        live = {parameter: parameter.data for parameter in self.values}
        try:
            for parameter, value in self.values.items():
                parameter.data = value.to(parameter.device, parameter.dtype)
            yield self._student
        finally:
            for parameter, data in live.items():
                parameter.data = data

    def weight_of(self, parameter: Tensor) -> Tensor:
        """The copy of `parameter` in its dtype; `parameter` itself, detached, if it is not trained."""
        value = self.values.get(parameter) if isinstance(parameter, nn.Parameter) else None
        return parameter.detach() if value is None else value.to(parameter.device, parameter.dtype)


@dataclass(frozen=True)
class OutputMatrix:
    """The output matrix of the frozen branches on the last pipeline stage."""

    weight: Callable[[], Tensor]
    """This rank's shard [V_pad/tp, H]."""
    centre: Callable[[], Tensor]
    """Its mean output vector over the true vocabulary [H]; one all-reduce, only once if the matrix is constant."""


class BranchWeights:
    """The weights of the anchor and of both teachers.

    Attributes:
        anchor: weights of the base branch.
        teacher: weights of both teachers; the same object as `anchor` if the settings are equal.
        copies: the moving copies by name, which a checkpoint must save.
    """

    def __init__(
        self, student: Student, anchor: WeightsConfig, teacher: WeightsConfig, *, output_follows: str = "anchor"
    ) -> None:
        """Creates the moving copies that the settings require.

        Args:
            student: the live model and its base.
            anchor: settings of the base branch.
            teacher: settings of both teachers.
            output_follows: `anchor` or `teacher`: the branch whose output matrix the loss uses if the matrix is
                trained. That of the other is the same or unused (`nemo_popsd.config.consistency`).
        """
        self._student = student
        self.copies: dict[str, MovingCopy] = {}
        self.anchor = self._of("anchor", anchor)
        self.teacher = self.anchor if teacher == anchor else self._of("teacher", teacher)
        self._output = self.anchor if output_follows == "anchor" else self.teacher

    def _of(self, name: str, settings: WeightsConfig) -> FrozenBase:
        student = self._student
        if settings.weights == "frozen":
            return _Base(student)
        if settings.weights == "live":
            return LiveWeights(student.chunks)
        self.copies[name] = MovingCopy(student.chunks, settings, on_host=student.keeps_copies_on_host)
        return self.copies[name]

    def follow(self, step: int) -> None:
        """Moves the copies after training step `step`."""
        for moving in self.copies.values():
            moving.follow(step)

    @property
    def state(self) -> Mapping[str, Mapping[nn.Parameter, Tensor]]:
        """The values of all copies, by name."""
        return {name: moving.values for name, moving in self.copies.items()}

    def output(self) -> OutputMatrix:
        """The output matrix as it is now; on the last pipeline stage."""
        student = self._student
        if isinstance(self._output, _Base) or not student.weight.requires_grad:
            return OutputMatrix(lambda: student.base_weight, lambda: student.centre)
        live = output_weight(student.chunks[-1])
        weight = self._output.weight_of(live) if isinstance(self._output, MovingCopy) else live.detach()
        return OutputMatrix(lambda: weight, lambda: mean_output_vector(weight, student.vocab_shard))


class _Base:
    """The student's frozen base."""

    def __init__(self, student: Student) -> None:
        """Under full fine-tuning, loads the copy, so that a base that cannot be loaded fails before any generation."""
        self._student = student
        student.base  # noqa: B018  (a cached property)

    def model(self) -> AbstractContextManager[list[ModelChunk]]:
        """The base's chunks."""
        return self._student.base.model()
