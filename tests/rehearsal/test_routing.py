"""Routing without values."""

from __future__ import annotations

import pytest
import torch

from nemo_popsd.rehearsal.counters import LiveBytes
from nemo_popsd.rehearsal.routing import balanced_map
from nemo_popsd.rehearsal.storage_free import StorageFree


@pytest.mark.parametrize(("tokens", "experts", "visits"), [(64, 16, 4), (7, 16, 3), (100, 128, 8), (5, 4, 4)])
def test_each_token_visits_its_experts_and_all_experts_equally_often(tokens: int, experts: int, visits: int) -> None:
    chosen = balanced_map(tokens, experts, visits)
    assert chosen.shape == (tokens, experts)
    assert (chosen.sum(1) == visits).all()
    counts = chosen.sum(0)
    assert counts.max() - counts.min() <= 1


def test_a_real_mask_selects_from_tensors_without_memory() -> None:
    with StorageFree():
        values = torch.empty(1 << 10, 1 << 10, requires_grad=True)
        selected = values.masked_select(torch.eye(1 << 10, dtype=torch.bool))
        assert selected.shape == (1 << 10,)
        (selected * selected).sum().backward()
        assert values.grad is not None


def test_freed_memory_counts_no_more() -> None:
    with StorageFree(), LiveBytes() as live:
        kept = torch.empty(1 << 18)
        freed = torch.empty(1 << 18)
        live.freed(freed)
        assert live.live == 4 << 18
        del freed
        assert live.live == 4 << 18
        del kept
        assert live.live == 0
    assert live.peak == 8 << 18
