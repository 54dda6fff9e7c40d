"""Tensors without storage next to real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from nemo_popsd.rehearsal.counters import Flops, LiveBytes
from nemo_popsd.rehearsal.storage_free import StorageFree, without_assigned_data


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    with without_assigned_data(), StorageFree():
        yield


def test_weights_have_no_memory_and_indices_are_real() -> None:
    layer, table = nn.Linear(1 << 12, 1 << 18), nn.Embedding(1 << 20, 1 << 12)  # 8 GB
    ids = torch.tensor([5, 7, 5])
    out = layer(table(ids))
    assert isinstance(out, FakeTensor)
    assert out.shape == (3, 1 << 18)
    assert ids.unique().tolist() == [5, 7]
    assert torch.cumsum(ids, 0).tolist() == [5, 12, 17]


def test_numbers_read_from_tensors_without_memory_are_constants() -> None:
    values = torch.empty(1 << 16, requires_grad=True)
    loss = values.sum()
    assert float(loss.detach()) == 0.5
    assert torch.stack([loss, loss]).tolist() == [0.5, 0.5]
    assert bool((values > 0).any())
    assert int(values.argmax()) == 0
    loss.backward()
    assert values.grad is not None
    assert values.grad.shape == values.shape


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half])
def test_a_cast_keeps_what_is_known_about_a_parameter(cast: object) -> None:
    layer = nn.Linear(256, 256)
    layer.weight.partition_dim = 1  # type: ignore[assignment]
    layer.bias.requires_grad_(False)
    cast(layer)  # type: ignore[operator]
    assert layer.weight.dtype != torch.float32
    assert layer.weight.partition_dim == 1
    assert [p.requires_grad for p in (layer.weight, layer.bias)] == [True, False]
    assert layer(torch.empty(2, 256, dtype=layer.weight.dtype)).shape == (2, 256)


def test_bytes_and_operations_are_counted_and_released() -> None:
    with LiveBytes() as live, Flops() as flops:
        weight = torch.empty(1024, 512, requires_grad=True)
        inputs = [torch.empty(2048, 1024) for _ in range(3)]
        for value in inputs:
            (value @ weight).sum().backward()
        del value
        inputs.clear()
    size = 4 * 1024 * 512
    assert live.live == 2 * size, "the weight and its gradient"
    assert 3 * 4 * 2048 * 1024 + 2 * size < live.peak < 3 * 4 * 2048 * 1024 + 2 * size + 3 * 4 * 2048 * 512 + size
    assert flops.total == 3 * 2 * 2 * 2048 * 1024 * 512, "forward, and the gradient of the weight"
