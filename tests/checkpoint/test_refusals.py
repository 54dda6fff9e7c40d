"""Current models that are not supported are refused by name, with the missing features, on every stack."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.checkpoint.architecture import read_architecture
from nemo_popsd.checkpoint.model_families import FAMILIES
from nemo_popsd.checkpoint.refusals import MISSING
from nemo_popsd.errors import UserError
from tests.test_support import PAGE

_COMMON = {
    "vocab_size": 203,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.12.1",
}
_PLAIN = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
_QUARTER = {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25}}
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0}
_LINEAR = {
    **_QUARTER,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 24}
_GEMMA_4 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "sliding_window": 5,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_SCALED_QUERIES = {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}}


def _text(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **_COMMON, **fields}


def _with_pictures(architecture: str, model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """`text` as a part of a model that also reads images."""
    inner = {key: value for key, value in text.items() if key != "architectures"}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": inner,
        "vision_config": {"depth": 2, "hidden_size": 16},
        "image_token_id": 200,
    }


_QWEN3_5 = _text("Qwen3_5ForCausalLM", "qwen3_5_text", **_LINEAR)
_QWEN3_5_MOE = _text("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", **_LINEAR, **_SHARED)
_GEMMA_4_TEXT = _text("Gemma4ForCausalLM", "gemma4_text", **_GEMMA_4)
_MINISTRAL_3 = _text("Ministral3ForCausalLM", "ministral3", **_SCALED_QUERIES)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3.5": (_QWEN3_5, "gated delta net"),
    "Qwen3.5 with images": (_with_pictures("Qwen3_5ForConditionalGeneration", "qwen3_5", _QWEN3_5), "image encoder"),
    "Qwen3.5 with experts": (_QWEN3_5_MOE, "gated shared expert"),
    "Qwen3.5 with experts and images": (
        _with_pictures("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", _QWEN3_5_MOE),
        "image encoder.*gated delta net",
    ),
    "Qwen3-Next": (_text("Qwen3NextForCausalLM", "qwen3_next", **_LINEAR, **_SHARED), "zero-centred"),
    "Gemma 4": (_GEMMA_4_TEXT, "two rotary embeddings.*keys used as values.*embeddings in each layer.*soft cap"),
    "Gemma 4 with images": (_with_pictures("Gemma4ForConditionalGeneration", "gemma4", _GEMMA_4_TEXT), "two widths"),
    "gpt-oss": (
        _text(
            "GptOssForCausalLM",
            "gpt_oss",
            attention_bias=True,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=5,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=7.0,
            rope_parameters=_YARN,
            quantization_config={"quant_method": "mxfp4"},
        ),
        r"attention sinks \(softmax_type=learnable\)",
    ),
    "EXAONE 4": (
        _text(
            "Exaone4ForCausalLM",
            "exaone4",
            layer_types=[*["sliding_attention"] * 3, "full_attention"],
            sliding_window=5,
            sliding_window_pattern="LLLG",
            **_PLAIN,
        ),
        "norms after attention.*without rotary",
    ),
    "GLM-4": (_text("Glm4ForCausalLM", "glm4", attention_bias=True, **_QUARTER), "no bridge"),
    "GLM-4.5": (
        _text(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            **_QUARTER,
        ),
        "sigmoid scores",
    ),
    "OLMo hybrid": (_text("OlmoHybridForCausalLM", "olmo_hybrid", **_LINEAR), "no bridge.*gated delta net"),
    "Ministral 3": (_MINISTRAL_3, "llama_4_scaling_beta"),
    "Ministral 3 with images": (
        _with_pictures("Mistral3ForConditionalGeneration", "mistral3", _MINISTRAL_3),
        "image encoder.*llama_4_scaling_beta",
    ),
    "Phi-4": (_text("Phi3ForCausalLM", "phi3", original_max_position_embeddings=4096, **_PLAIN), "several projections"),
    "Seed-OSS": (_text("SeedOssForCausalLM", "seed_oss", attention_bias=True, **_PLAIN), "no bridge"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_the_model_and_what_is_missing(tmp_path: Path, name: str) -> None:
    content, missing = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        read_architecture(tmp_path, setting="student.source", trust_remote_code=True)
    assert re.search(missing, str(refused.value.got)), refused.value.got
    assert f"model_type={content['model_type']!r}, which is not supported: " in str(refused.value.got)
    assert content["architectures"][0] in str(refused.value.got)
    assert refused.value.need.startswith("a supported architecture: ")
    assert refused.value.fix == "set student.source"
    assert "\n" not in str(refused.value)


def test_each_model_that_has_a_reason_has_a_case_and_is_not_supported() -> None:
    assert {content["model_type"] for content, _ in REFUSED.values()} == set(MISSING)
    assert not MISSING.keys() & {family.model_type for family in FAMILIES.values()}


def test_the_page_lists_each_refused_model_with_its_reason() -> None:
    [table] = re.findall(r"\| model \| `model_type` \| result \| reason \|\n((?:\|.*\n)+)", PAGE.read_text())
    refused = [line for line in table.splitlines() if "| refused |" in line]
    assert {name for line in refused for name in re.findall(r"`(\w+)`", line.split("|")[2])} == set(MISSING)


@pytest.mark.parametrize("model_type", [None, 7, ["qwen3_5"], "gpt2"])
def test_another_model_is_refused_without_a_reason(tmp_path: Path, model_type: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"], "model_type": model_type}))
    with pytest.raises(UserError, match="a supported architecture") as refused:
        read_architecture(tmp_path, setting="student.source", trust_remote_code=False)
    assert "not supported" not in str(refused.value)
