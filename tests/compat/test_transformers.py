"""Behaviour that `nemo_popsd.compat.transformers` makes equal for transformers 4 and 5, on the installed version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nemo_popsd.compat.transformers import (
    configuration_errors,
    rotary_scaling,
    rotary_theta,
    saved_tensors,
    unscale_windowed_layers,
    without_rotary_scaling,
)
from tests.tiny_models import save_tiny_model

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_theta": 500.0, "pad_token_id": None, "sliding_window": 4,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe", "olmo3"])
def test_saved_tensors_have_the_names_and_shapes_of_the_files(tmp_path: Path, kind: str) -> None:
    directory = save_tiny_model(tmp_path / kind, kind)
    content = json.loads((directory / "config.json").read_text())
    config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    with torch.device("meta"):
        tensors = saved_tensors(AutoModelForCausalLM.from_config(config))
    expected = {name: tensor.shape for name, tensor in load_file(directory / "model.safetensors").items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name in expected or "lm_head" not in name}
    assert shapes == expected
    assert all(tensor.is_meta for tensor in tensors.values())


def test_theta_and_scaling_are_read_from_either_form() -> None:
    scaled = CONFIG_MAPPING["olmo3"].from_dict({**SIZES, "rope_scaling": dict(YARN)})
    assert rotary_theta(scaled) == 500.0
    scaling = rotary_scaling(scaled)
    assert scaling is not None
    assert {key: scaling[key] for key in YARN} == YARN
    plain = without_rotary_scaling(scaled)
    assert rotary_scaling(plain) is None
    assert rotary_theta(plain) == 500.0
    assert rotary_scaling(scaled) == scaling, "the original is not changed"
    assert rotary_scaling(CONFIG_MAPPING["qwen3"].from_dict({"rope_theta": 5e5})) is None


def test_an_invalid_configuration_raises_one_of_the_listed_errors() -> None:
    with pytest.raises(configuration_errors()):
        CONFIG_MAPPING["qwen3"].from_dict({**SIZES, "layer_types": ["no_such_attention"] * 4})


@torch.no_grad()
def test_layers_with_a_window_have_the_unscaled_rotation_on_every_version() -> None:
    """With windows in all layers the scaling has no effect; without windows it is applied in all layers."""
    torch.manual_seed(3)
    ids = torch.arange(12)[None] * 5 % 64
    for layer_type, equal in (("sliding_attention", True), ("full_attention", False)):
        layers = {"layer_types": [layer_type] * 4}
        models = [
            AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmo3"].from_dict({**SIZES, **layers, **scaling})).eval()
            for scaling in ({}, {"rope_scaling": dict(YARN)})
        ]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            unscale_windowed_layers(model)
        plain, scaled = (model(ids).logits for model in models)
        assert torch.equal(plain, scaled) == equal, layer_type
