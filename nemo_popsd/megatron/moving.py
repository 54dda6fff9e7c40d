"""Weights of frozen branches that follow the student: the live weights, their moving average, or a snapshot of them.

A moving average or snapshot is a second set of the trained weights alone: of the adapters with LoRA, of all weights
under full fine-tuning. It takes the weights' place in the student's model for a forward pass without gradient, so no
second model is built. Values are fp32: in bf16 an average with a decay near 1 would not move.
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
    """The student as it is; a `FrozenBase` whose weights move with every update."""

    def __init__(self, student: Sequence[ModelChunk]) -> None:
        self._student = list(student)

    @contextmanager
    def model(self) -> Iterator[list[ModelChunk]]:
        """The student's chunks."""
        yield self._student


class MovingCopy:
    """A second set of the student's trained weights; a `FrozenBase` that `follow` moves.

    Attributes:
        values: fp32, by parameter; this rank's shards.
    """

    def __init__(self, student: Sequence[ModelChunk], settings: WeightsConfig, *, on_host: bool = False) -> None:
        """Copies the trained weights as they are: those of the base in a new run.

        Args:
            student: chunks of the live model.
            settings: how the copy follows.
            on_host: keep the values in (pinned) host memory; `model` copies them to the device, once for each use.
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
        """The student's chunks with the copy in the place of their trained weights, rounded to the model's dtype."""
        live = {parameter: parameter.data for parameter in self.values}
        try:
            for parameter, value in self.values.items():
                parameter.data = value.to(parameter.device, parameter.dtype)
            yield self._student
        finally:
            for parameter, data in live.items():
                parameter.data = data

    def weight_of(self, parameter: Tensor) -> Tensor:
        """The copy of `parameter` in its dtype; `parameter` itself, detached, where it is not trained."""
        value = self.values.get(parameter) if isinstance(parameter, nn.Parameter) else None
        return parameter.detach() if value is None else value.to(parameter.device, parameter.dtype)


@dataclass(frozen=True)
class OutputMatrix:
    """The output matrix of the frozen branches on the last pipeline stage."""

    weight: Callable[[], Tensor]
    """This rank's shard [V_pad/tp, H]."""
    centre: Callable[[], Tensor]
    """Its mean output vector over the true vocabulary [H]; one all-reduce, once where the matrix does not move."""


class BranchWeights:
    """The weights of the anchor and of both teachers, as the run sets them.

    Attributes:
        anchor: of the base branch.
        teacher: of both teachers; the same object as `anchor` where their settings are the same.
        copies: the moving copies by name, which a checkpoint has to save.
    """

    def __init__(
        self, student: Student, anchor: WeightsConfig, teacher: WeightsConfig, *, output_follows: str = "anchor"
    ) -> None:
        """Copies weights where a moving copy is set.

        Args:
            student: the live model and its base.
            anchor: settings of the base branch.
            teacher: settings of both teachers.
            output_follows: whose output matrix the loss uses where it is trained: `anchor` or `teacher`. The other's is
                the same or not used (`nemo_popsd.config.consistency`).
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
        """Under full fine-tuning loads the copy: a base that cannot be loaded ends the run before it generates."""
        self._student = student
        student.base  # noqa: B018  (a cached property)

    def model(self) -> AbstractContextManager[list[ModelChunk]]:
        """The base's chunks."""
        return self._student.base.model()
