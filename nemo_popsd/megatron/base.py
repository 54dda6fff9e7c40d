"""The frozen base: the student's initial weights, kept without a copy under LoRA, as a copy under full fine-tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from nemo_popsd.megatron.adapters import Adapters


class FrozenBase(Protocol):
    """Weights θ₀ of all three frozen branches."""

    def model(self) -> AbstractContextManager[list[GPTModel]]:
        """A context within which the returned chunks compute with θ₀; use no other model within it."""


class AdaptersOff:
    """The student with its adapters off: no copy, and nothing that could drift."""

    def __init__(self, student: Sequence[GPTModel], adapters: Adapters) -> None:
        self._student = list(student)
        self._adapters = adapters

    @contextmanager
    def model(self) -> Iterator[list[GPTModel]]:
        """The student's chunks; their adapters are off within."""
        with self._adapters.off():
            yield self._student


class FrozenCopy:
    """A second model with the student's initial weights, for full fine-tuning."""

    def __init__(self, copy: Sequence[GPTModel]) -> None:
        self._copy = [chunk.requires_grad_(False).eval() for chunk in copy]

    @contextmanager
    def model(self) -> Iterator[list[GPTModel]]:
        """The copy's chunks."""
        yield self._copy


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 of this rank's parameters but adapters, by name and bits: equal if and only if the base is the same."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".adapter." not in name:
            digest.update(name.replace(".to_wrap", "").encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
