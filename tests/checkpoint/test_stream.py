"""Streamed tensors stay on the device: only the rank that writes copies them to the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from tests.tiny_models import save_tiny_model


def test_streams_do_not_copy_tensors_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceModel(save_tiny_model(tmp_path / "model"))
    source.vocabulary_tensors = set  # type: ignore[method-assign]
    requested: dict[str, Any] = {}

    class Bridge:
        def stream_weights_megatron_to_hf(self, *_: Any, **options: Any) -> Any:
            requested.update(options)
            return iter(())

        def stream_adapter_weights_megatron_to_hf(self, *_: Any, **options: Any) -> Any:
            requested.update(options)
            return iter([("a", torch.zeros(1))])

    monkeypatch.setattr(HuggingFaceModel, "_bridge", Bridge())
    assert list(source.stream([])) == []
    assert requested["cpu"] is False
    requested.clear()
    assert [name for name, _ in source.stream_adapters([])] == ["base_model.model.a"]
    assert requested["cpu"] is False
