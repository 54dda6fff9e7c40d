"""Arguments of a vLLM server, and which weights it is sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.rollout.vllm.config import VllmConfig
from nemo_popsd.rollout.vllm.launch import AdapterShape, ServedModel, adapter_base, refuse_quantization, server_launch

MODEL = ServedModel(
    source="nemo_popsd:tiny_reasoner",
    precision="bf16",
    lora=AdapterShape(rank=12, alpha=24.0),
    has_experts=False,
    weights=list,
    adapters=list,
    write_files=lambda directory: None,
)


def settings(model: ServedModel, *, adapter: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"output": Path("/run"), "limit": 10, "replica": 3, "devices": None}
    return server_launch(RolloutConfig(), model, Path("/model"), adapter=adapter, **options).settings


def test_a_server_gets_the_overrides_of_the_models_configuration() -> None:
    overrides = {"rope_theta": 1000000.0, "rope_scaling": None}
    with_overrides = replace(MODEL, config_overrides=overrides)
    assert settings(with_overrides, adapter=True)["arguments"]["hf_overrides"] == overrides
    assert "hf_overrides" not in settings(MODEL, adapter=True)["arguments"]


def test_a_server_of_adapters_reads_the_base_and_one_of_merged_weights_does_not() -> None:
    adapters, merged = settings(MODEL, adapter=True), settings(MODEL, adapter=False)
    assert adapters["adapter"] == {"r": 12, "lora_alpha": 24.0}
    assert adapters["arguments"]["max_lora_rank"] == 16
    assert adapters["arguments"]["load_format"] == "auto"
    assert merged["adapter"] is None
    assert merged["arguments"]["load_format"] == "dummy"
    assert "enable_lora" not in merged["arguments"]


def test_adapters_are_sent_for_dense_models_in_hugging_face_directories(tmp_path: Path) -> None:
    auto = VllmConfig()
    base = adapter_base(auto, MODEL)
    assert base is not None
    assert any(base.glob("*.safetensors"))
    assert adapter_base(replace(auto, lora="merged"), MODEL) is None
    assert adapter_base(auto, replace(MODEL, lora=None)) is None
    for other, obstacle in (
        (replace(MODEL, has_experts=True), "a model with experts"),
        (replace(MODEL, lora=AdapterShape(rank=513, alpha=1.0)), "student.lora.rank=513"),
        (replace(MODEL, source=str(tmp_path)), "which is not a Hugging Face directory"),
    ):
        assert adapter_base(auto, other) is None
        with pytest.raises(UserError, match=obstacle):
            adapter_base(replace(auto, lora="adapter"), other)


def test_a_base_is_quantised_where_only_adapters_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = VllmConfig(quantization="fp8_per_tensor")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse_quantization(VllmConfig(), adapter=False)
    refuse_quantization(quantised, adapter=True)
    with pytest.raises(UserError, match=r"quantization=fp8_per_tensor; need a base that does not change"):
        refuse_quantization(quantised, adapter=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse_quantization(replace(quantised, launcher=["srun"]), adapter=True)
    with pytest.raises(UserError, match=r"need a GPU"):
        refuse_quantization(quantised, adapter=True)
    options: dict[str, Any] = {"output": Path("/run"), "limit": 10, "replica": 3, "devices": None, "adapter": True}
    launched = server_launch(RolloutConfig(vllm=quantised), MODEL, Path("/model"), **options)
    assert launched.settings["arguments"]["quantization"] == "fp8_per_tensor"
    assert "quantization" not in settings(MODEL, adapter=True)["arguments"]
