"""Weights are copied before they are written only if training would change them meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint import weights


def _staged(monkeypatch: pytest.MonkeyPatch, prepared: torch.Tensor, *, copy: bool) -> torch.Tensor:
    """The tensors staged for a model with the storage `MODEL` if Megatron prepares the tensor `prepared`."""
    buckets = [(Path("shard.distcp"), "key", ([], [("item", prepared)]))]
    request = SimpleNamespace(
        finalize_fns=[],
        async_fn=SimpleNamespace(args=([], [])),
        async_fn_args=([], buckets, None),
        preload_fn=lambda: buckets,
    )
    monkeypatch.setattr(weights, "stage_save", lambda *_: request)
    monkeypatch.setattr(weights, "replicas", lambda: None)
    monkeypatch.setattr(weights, "share_writing", lambda *_: None)
    model: Any = SimpleNamespace(parameters=lambda: iter([torch.nn.Parameter(MODEL)]), sharded_state_dict=dict)
    staged = weights.StagedWeights([model], Path("unused"), which=weights.every_parameter, copy=copy)
    [(_, _, (_, [(_, tensor)]))] = staged._buckets
    assert staged.bytes == prepared.numel() * 4
    assert torch.equal(prepared, tensor)
    return tensor


MODEL = torch.arange(4.0)


@pytest.mark.parametrize(
    ("prepared", "copy", "copied"),
    [
        (MODEL, True, True),  # the model's own memory, which the next step changes
        (MODEL[1:3], True, True),
        (MODEL, False, False),
        (MODEL.clone(), True, False),  # Megatron has copied it: from a GPU, or because it is a view of a buffer
    ],
)
def test_weights_are_copied_once(
    monkeypatch: pytest.MonkeyPatch, prepared: torch.Tensor, copy: bool, copied: bool
) -> None:
    staged = _staged(monkeypatch, prepared, copy=copy)
    assert (prepared.data_ptr() != staged.data_ptr()) == copied
