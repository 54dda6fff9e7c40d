"""Balanced routing of tokens to experts, for router logits that have no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


def balanced_map(tokens: int, experts: int, visits: int) -> Tensor:
    """A [tokens, experts] bool map in which token i visits `visits` experts starting at i·visits, so that the visits of
    any two experts differ by at most 1.
    """
    chosen = (torch.arange(tokens).unsqueeze(1) * visits + torch.arange(visits)) % experts
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)


@contextmanager
def balanced_routing() -> Iterator[None]:
    """Context in which routers compute logits and probabilities as usual, and then route tokens by `balanced_map`.

    The map is a real tensor, because dispatchers compute the sizes of their messages from it.
    """
    routing = TopKRouter.routing

    def balanced(self: Any, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        probabilities, _ = routing(self, logits, *args, **options)
        tokens, experts = probabilities.shape
        return probabilities, balanced_map(tokens, experts, self.topk)

    with mock.patch.object(TopKRouter, "routing", balanced):
        yield
