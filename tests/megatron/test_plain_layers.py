"""The configurations that `PlainLayers` accepts. test_decoding.py compares its results with Megatron's layers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest


@pytest.fixture
def plain_fields() -> Any:
    from nemo_popsd.megatron import plain_fields

    return plain_fields


def configuration(**values: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **values)


def test_every_field_of_the_installed_megatron_is_in_one_list(plain_fields: Any) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    lists = (plain_fields.IMPLEMENTED, plain_fields.IRRELEVANT, plain_fields.DEFAULT_ONLY)
    names = [name for names in lists for name in names]
    assert len(names) == len(set(names))
    installed = {field.name for field in fields(TransformerConfig)}
    assert installed <= set(names)
    # The lists are those of both supported versions; a field that neither has does not remain in them.
    if "moe_extended_tp" not in installed:  # megatron-core 0.19
        only_0_16 = {"async_tensor_model_parallel_allreduce", "moe_extended_tp", "moe_use_legacy_grouped_gemm"}
        assert set(names) - installed == only_0_16


def test_a_usual_configuration_is_accepted(plain_fields: Any) -> None:
    assert plain_fields.unsupported_fields(configuration(normalization="RMSNorm", num_query_groups=2)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp32_residual_connection", True),
        ("attention_output_gate", True),
        ("rotary_interleaved", True),
        ("activation_func_clamp_value", 7.0),
        ("softmax_type", "off-by-one"),
    ],
)
def test_another_value_than_the_default_is_refused(plain_fields: Any, name: str, value: Any) -> None:
    config = configuration()
    setattr(config, name, value)
    assert plain_fields.unsupported_fields(config) == [name]


def test_a_field_that_is_in_no_list_is_refused_at_its_default(
    plain_fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_fields, "IRRELEVANT", plain_fields.IRRELEVANT - {"init_method_std"})
    assert plain_fields.unsupported_fields(configuration()) == ["init_method_std"]
