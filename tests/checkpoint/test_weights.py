"""Weights are copied before they are written only if training would change them meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint import weights


def _staged(monkeypatch: pytest.MonkeyPatch, device: str, *, copy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor that Megatron prepares for a model on `device`, always in host memory, and the staged tensor."""
    prepared = torch.arange(4.0)
    buckets = [(Path("shard.distcp"), "key", ([], [("item", prepared)]))]
    request = SimpleNamespace(
        finalize_fns=[],
        async_fn=SimpleNamespace(args=([], [])),
        async_fn_args=([], buckets, None),
        preload_fn=lambda: buckets,
    )
    monkeypatch.setattr(weights.dist_checkpointing, "save", lambda *_, **__: request)
    model: Any = SimpleNamespace(
        parameters=lambda: iter([torch.nn.Parameter(torch.empty(4, device=device))]), sharded_state_dict=dict
    )
    staged = weights.StagedWeights([model], Path("unused"), which=weights.every_parameter, copy=copy)
    [(_, _, (_, [(_, tensor)]))] = staged._buckets
    assert staged.bytes == 16
    return prepared, tensor


@pytest.mark.parametrize(
    ("device", "copy", "copied"),
    [
        ("cpu", True, True),  # the model's own memory, which the next step changes
        ("cpu", False, False),
        ("meta", True, False),  # for a GPU: Megatron has copied it to the host already
    ],
)
def test_weights_are_copied_once(monkeypatch: pytest.MonkeyPatch, device: str, copy: bool, copied: bool) -> None:
    prepared, tensor = _staged(monkeypatch, device, copy=copy)
    assert torch.equal(prepared, tensor)
    assert (prepared.data_ptr() != tensor.data_ptr()) == copied
