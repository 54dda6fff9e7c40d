"""Tensors that are streamed stay on the device: of all ranks the one that writes alone copies them to its host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from tests.tiny_models import save_tiny_model


def test_no_rank_but_the_writer_copies_tensors_to_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceModel(save_tiny_model(tmp_path / "model"))
    source.vocabulary_tensors = set  # type: ignore[method-assign]
    asked: dict[str, Any] = {}

    class Bridge:
        def stream_weights_megatron_to_hf(self, *_: Any, **options: Any) -> Any:
            asked.update(options)
            return iter(())

        def stream_adapter_weights_megatron_to_hf(self, *_: Any, **options: Any) -> Any:
            asked.update(options)
            return iter([("a", torch.zeros(1))])

    monkeypatch.setattr(HuggingFaceModel, "_bridge", Bridge())
    assert list(source.stream([])) == []
    assert asked["cpu"] is False
    asked.clear()
    assert [name for name, _ in source.stream_adapters([])] == ["base_model.model.a"]
    assert asked["cpu"] is False
