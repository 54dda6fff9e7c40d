"""Supported and refused keys of ``config.json``, in the forms of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.checkpoint.architecture import read_architecture
from nemo_popsd.compat.transformers import rotary_theta
from nemo_popsd.errors import UserError

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN2 = {
    **{key: value for key, value in _QWEN3.items() if key not in ("attention_bias", "head_dim", "rope_scaling")},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "use_mrope": False,
    "sliding_window": 4096,
}
_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
}
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": _LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
_YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
_OLMO3 = {
    **{key: value for key, value in _LLAMA.items() if key not in ("mlp_bias", "pretraining_tp", "bos_token_id")},
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
    "max_position_embeddings": 65536,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rope_scaling": _YARN,
    "sliding_window": 4096,
    "dtype": "bfloat16",
    "vocab_size": 100278,
}
_SMOLLM3 = {
    **{key: value for key, value in _LLAMA.items() if key != "tie_word_embeddings"},
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
_MISTRAL = {
    **{key: value for key, value in _LLAMA.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")},
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
}


def _as_5(content: dict[str, Any], parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """`content` in the form in which transformers 5 saves it."""
    older = ("rope_theta", "rope_scaling", "torch_dtype")
    kept = {key: value for key, value in content.items() if key not in older}
    return {**kept, "dtype": "bfloat16", "transformers_version": "5.0.0", "rope_parameters": parameters, **fields}


RELEASED = {
    "Qwen3-0.6B": {**_QWEN3, "hidden_size": 1024, "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3,
    "Qwen3-32B": {**_QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64},
    "Qwen3-4B-Instruct-2507": {**_QWEN3, "rope_theta": 5000000, "max_position_embeddings": 262144},
    "Qwen3-30B-A3B": _MOE,
    "Qwen3-30B-A3B-Thinking-2507": {**_MOE, "rope_theta": 10000000, "max_position_embeddings": 262144},
    "Qwen3-Coder-30B-A3B": {
        **_MOE,
        "qkv_bias": False,
        "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
    },
    "Qwen2.5-7B": _QWEN2,
    "Qwen2.5-7B-Instruct": {**_QWEN2, "sliding_window": 131072},
    "DeepSeek-R1-Distill-Qwen-7B": {**_QWEN2, "rope_theta": 10000, "max_window_layers": 28},
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA,
    "Llama-3.2-1B": {**_LLAMA, "head_dim": 64, "hidden_size": 2048, "rope_scaling": {**_LLAMA3, "factor": 32.0}},
    "Llama-2-7b": {
        **{key: value for key, value in _LLAMA.items() if key not in ("rope_theta", "num_key_value_heads")},
        "rope_scaling": None,
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
    },
    "Mistral-7B-v0.3": _MISTRAL,
    "Olmo-3-7B": _OLMO3,
    "SmolLM3-3B": _SMOLLM3,
    "Qwen3-8B in 5": _as_5(
        _QWEN3, {"rope_theta": 1000000, "rope_type": "default"}, layer_types=["full_attention"] * 36, pad_token_id=None
    ),
    "Qwen3-30B-A3B in 5": _as_5(
        {key: value for key, value in _MOE.items() if key != "num_experts"},
        {"rope_theta": 1000000, "rope_type": "default"},
        num_local_experts=128,
    ),
    "SmolLM3-3B in 5": _as_5(_SMOLLM3, {"rope_theta": 5000000.0, "rope_type": "default"}),
    "Llama-3.1-8B in 5": _as_5(_LLAMA, {**_LLAMA3, "rope_theta": 500000.0}),
    "Olmo-3-7B in 5": _as_5(
        _OLMO3,
        {
            "full_attention": {**_YARN, "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
}


def _read(folder: Path, content: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(content))
    return read_architecture(folder, setting="student.source", trust_remote_code=False)


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_read(tmp_path: Path, name: str) -> None:
    content = RELEASED[name]
    read = _read(tmp_path, content)
    theta = content.get("rope_theta", 10000.0)
    if "rope_parameters" in content:
        parameters = content["rope_parameters"]
        theta = parameters.get("full_attention", parameters)["rope_theta"]
        assert read.changed
        # The content has both forms.
        assert read.content["rope_parameters"] == parameters
        assert read.content["rope_theta"] == theta
        assert _read(tmp_path, read.content).config.to_dict() == read.config.to_dict()
    else:
        assert not read.changed
    assert rotary_theta(read.config) == theta
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"):
        assert getattr(read.config, key) == content[key]
    if "Moe" in content["architectures"][0]:
        assert read.config.num_experts == 128


_DEFAULT = {"rope_type": "default", "rope_theta": 1000000}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # Rotary embedding.
    (_QWEN3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling with rope_type='yarn' in Qwen3"),
    (_QWEN3, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "with rope_type='dynamic'"),
    (_LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "with rope_type='linear' in Llama"),
    (_QWEN3, {"rope_scaling": {"rope_type": "longrope"}}, "with rope_type='longrope'"),
    (_QWEN3, {"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "with rope_type='default' and type='yarn'"),
    (_QWEN3, {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
    (_QWEN3, {"rope_scaling": 7}, "rope_scaling=7"),
    (_LLAMA, {"rope_scaling": {**_LLAMA3, "low_freq_factor": 2.0}}, "only the factor"),
    (_LLAMA, {"rope_scaling": {**_LLAMA3, "factor": -8}}, "rope_scaling.factor=-8"),
    (_OLMO3, {"rope_scaling": {**_YARN, "attn_factor": 0.9}}, "attn_factor"),
    (_OLMO3, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "with rope_type='dynamic' in Olmo3"),
    (_QWEN3, {"rope_theta": 0}, "rope_theta=0"),
    (_QWEN3, {"rope_theta": "1e6"}, "rope_theta='1e6'"),
    (_QWEN3, {"rope_theta": None}, "rope_theta=None"),
    (
        _QWEN3,
        {"rope_parameters": {**_DEFAULT, "rope_theta": 10000}},
        "rope_theta=1000000 contradicting rope_parameters",
    ),
    (
        _LLAMA,
        {"rope_parameters": {**_DEFAULT, "rope_theta": 500000.0}},
        "rope_scaling=.* contradicting rope_parameters",
    ),
    (_QWEN3, {"rope_parameters": {**_DEFAULT, "rope_type": "yarn", "factor": 4.0}}, "with rope_type='yarn'"),
    (_QWEN3, {"rope_parameters": {**_DEFAULT, "rope_type": "dynamic", "factor": 4.0}}, "with rope_type='dynamic'"),
    (_QWEN3, {"rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (_QWEN3, {"rope_parameters": {"full_attention": _DEFAULT}}, "full_attention"),
    (_QWEN3, {"rope_parameters": []}, r"rope_parameters=\[\]"),
    (_OLMO3, {"rope_parameters": {"full_attention": {**_YARN, "rope_theta": 5e5}}}, "one object for each layer type"),
    # Layers.
    (_MISTRAL, {"sliding_window": 4096}, "sliding_window=4096 in MistralForCausalLM"),
    (_QWEN3, {"use_sliding_window": True}, "use_sliding_window=True"),
    (_QWEN2, {"layer_types": ["sliding_attention", *["full_attention"] * 35]}, "layer_types="),
    (_OLMO3, {"layer_types": ["full_attention"]}, "layer_types="),
    (_OLMO3, {"sliding_window": None}, "sliding_window=None"),
    (_SMOLLM3, {"no_rope_layers": [1, 1, 1, 0]}, r"no_rope_layers=\[1, 1, 1, 0\] of 36 layers in SmolLM3"),
    (_SMOLLM3, {"no_rope_layers": [2] * 36}, "no_rope_layers="),
    (_SMOLLM3, {"no_rope_layers": [True] * 36}, "no_rope_layers="),
    (_SMOLLM3, {"no_rope_layers": 4}, "no_rope_layers=4"),
    (_SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    (_SMOLLM3, {"use_sliding_window": True}, "use_sliding_window=True"),
    (_SMOLLM3, {"attention_bias": True}, "attention_bias=True"),
    (_SMOLLM3, {"mlp_bias": True}, "mlp_bias=True"),
    (_SMOLLM3, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "with rope_type='yarn' in SmolLM3"),
    (_LLAMA, {"no_rope_layers": [1, 0] * 16}, "no_rope_layers=.* an unknown key"),
    (_QWEN3, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (_QWEN3, {"attention_bias": True}, "attention_bias=True"),
    (_LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
    (_LLAMA, {"attention_bias": True}, "attention_bias=True"),
    (_LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
    (_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (_QWEN3, {"attention_dropout": 0.3}, "attention_dropout=0.3"),
    (_MOE, {"norm_topk_prob": False}, "norm_topk_prob=False"),
    (_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    (_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    (_MOE, {"num_local_experts": 64}, "num_local_experts=64 contradicting num_experts=128"),
    (_MOE, {"num_experts_per_tok": 129}, "num_experts_per_tok=129"),
    (_QWEN3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, an unknown key"),
    (_QWEN3, {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
    (_QWEN3, {"logits_scaling": 2.0}, "logits_scaling"),
    (_QWEN3, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    (_QWEN3, {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    (_QWEN3, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
    (_QWEN3, {"tie_word_embeddings": None}, "tie_word_embeddings=None"),
    (_QWEN3, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
    # Sizes.
    (_QWEN3, {"rms_norm_eps": 0}, "rms_norm_eps=0"),
    (_QWEN3, {"rms_norm_eps": float("nan")}, "NaN, which is not finite"),
    (_QWEN3, {"initializer_range": float("inf")}, "Infinity, which is not finite"),
    (_QWEN3, {"hidden_size": 0}, "hidden_size=0"),
    (_QWEN3, {"hidden_size": True}, "hidden_size=True"),
    (_QWEN3, {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    (_QWEN3, {"num_hidden_layers": "36"}, "num_hidden_layers='36'"),
    (_QWEN3, {"vocab_size": 10**13}, "vocab_size="),
    (_QWEN3, {"num_key_value_heads": 5}, "num_key_value_heads=5"),
    (_QWEN3, {"head_dim": 7}, "odd width 7"),
    (_QWEN2, {"num_attention_heads": 27, "num_key_value_heads": 27}, "no head_dim"),
    # Architecture.
    (_QWEN3, {"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    (_QWEN3, {"architectures": None}, "architectures=None"),
    (_QWEN3, {"architectures": [["Qwen3ForCausalLM"]]}, "architectures="),
    (_QWEN3, {"model_type": "qwen2"}, "model_type='qwen2'"),
    ({**_QWEN3, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, {}, "Gemma2ForCausalLM"),
]


@pytest.mark.parametrize(("content", "fields", "message"), REFUSED, ids=[str(fields)[:50] for _, fields, _ in REFUSED])
def test_a_configuration_that_megatron_computes_differently_is_refused(
    tmp_path: Path, content: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        _read(tmp_path, {**content, **fields})
    assert "\n" not in str(refused.value)


def test_layers_without_rotary_embedding_need_a_base_for_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rope_theta in SmolLM3"):
        _read(tmp_path, {name: value for name, value in _SMOLLM3.items() if name != "rope_theta"})


def test_an_interval_says_which_layers_have_no_rotary_embedding(tmp_path: Path) -> None:
    content = {name: value for name, value in _SMOLLM3.items() if name != "no_rope_layers"}
    assert _read(tmp_path, content).config.no_rope_layers == [1, 1, 1, 0] * 9
    with pytest.raises(UserError, match="no_rope_layer_interval=None"):
        _read(tmp_path, {name: value for name, value in content.items() if name != "no_rope_layer_interval"})


@pytest.mark.parametrize("key", ["num_attention_heads", "rms_norm_eps", "norm_topk_prob", "num_experts"])
def test_a_missing_size_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=key):
        _read(tmp_path, {name: value for name, value in _MOE.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "property name"),
        ("[1]", "a JSON list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"rope_theta": 1e999}', "not finite"),
        ("\ufeff{}", "byte order mark"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs pointer"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path, setting="student.source", trust_remote_code=False)
