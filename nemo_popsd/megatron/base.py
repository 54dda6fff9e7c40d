"""The frozen base, the student's initial weights: the student without adapters, or a copy under full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from torch import nn

from nemo_popsd.megatron.adapters import Adapters
from nemo_popsd.megatron.forward import output_weight
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.offload import HostParameters


class FrozenBase(Protocol):
    """Weights θ₀ of all three frozen branches."""

    def model(self) -> AbstractContextManager[list[ModelChunk]]:
        """Context in which the returned chunks compute with θ₀; no other model may be used in it."""


class AdaptersOff:
    """The student with its adapters disabled; needs no copy of the weights."""

    def __init__(self, student: Sequence[ModelChunk], adapters: Adapters) -> None:
        self._student = list(student)
        self._adapters = adapters

    @contextmanager
    def model(self) -> Iterator[list[ModelChunk]]:
        """The student's chunks with adapters disabled."""
        with self._adapters.off():
            yield self._student


class FrozenCopy:
    """A second model with the student's initial weights, for full fine-tuning.

    A copy on the host needs no device memory between the frozen passes, except for its output matrix (V_pad/tp · H
    elements on the last stage), which the loss needs in training; `model` copies the rest to the device once per use.
    The tensor of the output matrix is the same inside and outside of `model`.
    """

    def __init__(self, copy: Sequence[ModelChunk], *, on_host: bool = False) -> None:
        """Freezes `copy` and keeps it.

        Args:
            copy: this rank's chunks with their weights, on the device.
            on_host: keep everything except the output matrix in (pinned) host memory.
        """
        self._copy = [chunk.requires_grad_(False).eval() for chunk in copy]
        self._host: HostParameters | None = None
        if on_host:
            kept = output_weight(self._copy[-1]) if self._copy[-1].post_process else None
            self._host = HostParameters(p for p in self._parameters() if p is not kept)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for chunk in self._copy for parameter in chunk.parameters())

    @property
    def host_bytes(self) -> int:
        """Bytes of this rank's copy in host memory."""
        return 0 if self._host is None else self._host.bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the copy's parameters that are on the device now."""
        return sum(p.numel() * p.element_size() for p in self._parameters())

    @contextmanager
    def model(self) -> Iterator[list[ModelChunk]]:
        """The copy's chunks, on the device."""
        with nullcontext() if self._host is None else self._host.on_device():
            yield self._copy
