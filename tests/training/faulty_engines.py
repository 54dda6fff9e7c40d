"""Engines that generate with other weights or prompts than the trainer assumes, like faulty servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams

Weights = list[torch.Tensor]


class FaultyEngine:
    """Generates with other weights or prompts than the live ones, but reports the version of the live weights."""

    def __init__(
        self,
        engine: RolloutEngine,
        student: Any,
        *,
        weights: Weights | None = None,
        prompt: Callable[[Sequence[int]], Sequence[int]] = lambda prompt: prompt,
    ) -> None:
        self._engine, self._student = engine, student
        self._weights, self._prompt = weights, prompt

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        requests = [replace(request, prompt=self._prompt(request.prompt)) for request in requests]
        with _replaced(self._student, self._weights):
            return self._engine.generate(requests, sampling)


def trained_weights(student: Any) -> Weights:
    """Copies of the trained weights: all weights, or the adapters."""
    return [parameter.detach().clone() for parameter in _trained(student)]


def garbage(student: Any) -> Weights:
    """The same weights in another order, like a buffer filled with the bytes of another tensor."""
    generator = torch.Generator().manual_seed(1)
    return [
        weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)
        for weight in trained_weights(student)
    ]


def _trained(student: Any) -> list[torch.nn.Parameter]:
    return [p for chunk in student.chunks for p in chunk.parameters() if p.requires_grad]


@contextmanager
def _replaced(student: Any, weights: Weights | None) -> Iterator[None]:
    if weights is None:
        yield
        return
    live = trained_weights(student)
    try:
        _set(student, weights)
        yield
    finally:
        _set(student, live)


def _set(student: Any, weights: Weights) -> None:
    with torch.no_grad():
        for parameter, weight in zip(_trained(student), weights, strict=True):
            parameter.copy_(weight)
