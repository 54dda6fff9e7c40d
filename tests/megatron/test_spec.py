"""The selection of layers by machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.megatron import spec
from nemo_popsd.megatron.config import StudentConfig


@pytest.mark.parametrize(
    ("setting", "cuda", "engine", "chosen"),
    [
        ("auto", True, True, "transformer_engine"),
        ("auto", True, False, "local"),
        ("auto", False, True, "local"),
        ("auto", False, False, "local"),
        ("local", True, True, "local"),
        ("transformer_engine", True, True, "transformer_engine"),
    ],
)
def test_the_layers_depend_on_the_machine_only_for_auto(monkeypatch, setting, cuda, engine, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(spec, "transformer_engine_imports", lambda: engine)
    assert spec.chosen_layers(setting) == chosen


def test_a_missing_transformer_engine_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(spec, "transformer_engine_imports", lambda: False)
    with pytest.raises(UserError, match=r"student\.layers=transformer_engine.*does not import.*student\.layers=local"):
        spec.chosen_layers("transformer_engine")


def test_local_layers_use_no_fused_kernel_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(spec, "transformer_engine_imports", lambda: False)
    provider = SimpleNamespace(gradient_accumulation_fusion=True, apply_rope_fusion=True)
    with caplog.at_level("INFO", logger=spec.__name__):
        spec.choose_layer_spec(provider, "auto")
    assert provider.transformer_layer_spec is spec.local_layer_spec
    assert not provider.gradient_accumulation_fusion
    assert not provider.apply_rope_fusion
    assert "layers: local (student.layers=auto)" in caplog.text


@pytest.mark.parametrize("apex", [True, False])
def test_gradients_are_accumulated_by_a_kernel_only_where_megatrons_own_linears_have_it(monkeypatch, apex):
    """Megatron-Bridge 0.6 enables it with Transformer Engine alone; building the output matrix would then fail."""
    monkeypatch.setattr(spec, "on_transformer_engine", lambda setting: True)
    monkeypatch.setattr(spec.layers, "_grad_accum_fusion_available", apex)
    provider = SimpleNamespace(
        gradient_accumulation_fusion=True,
        position_embedding_type="rope",
        rotary_interleaved=False,
        gated_linear_unit=False,
    )
    for enabled in (True, False):
        provider.gradient_accumulation_fusion = enabled
        spec.choose_layer_spec(provider, "auto")
        assert provider.gradient_accumulation_fusion is (enabled and apex)
    assert provider.apply_rope_fusion


def test_an_unknown_value_of_layers_is_refused():
    with pytest.raises(UserError, match=r"student\.layers"):
        StudentConfig(layers="torch")
