"""Small Hugging Face models with random weights, saved to disk: the dense reference of many tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nemo_popsd.checkpoint.model_families import FAMILIES
from nemo_popsd.compat.transformers import unscale_windowed_layers

_COMMON: dict[str, Any] = {
    "vocab_size": 203,  # not divisible in any layout, so the vocabulary is always padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 12}),  # differs from hidden_size / heads
    "qwen3_tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_scaling": _LLAMA3, "max_position_embeddings": 256}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 5, "rope_scaling": _YARN, "pad_token_id": 0}),
}
KINDS = tuple(kind for kind in _KINDS if kind not in ("qwen3_moe", "mistral"))
"""Dense models, on which every layout is tested."""


def save_tiny_model(directory: str | Path, kind: str = "qwen3", *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a random model of `kind` in fp32, with additional files that an export must copy.

    All parameters are random, including norms and biases, with a spread such that an exchanged one changes the logits.

    Args:
        directory: directory to create.
        kind: one of `KINDS`, `qwen3_moe` or `mistral`.
        seed: seed of the weights.
        overrides: fields of the transformers configuration.
    """
    import transformers

    family, fields = _KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **fields, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    directory = Path(directory)
    model.save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"note": "stands for a tokenizer"}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def assert_same_configuration(exported: Path, source: Path) -> None:
    """Asserts equal bytes; if transformers 5 wrote `source`, an export additionally has the keys of transformers 4."""
    before, after = (file / "config.json" for file in (source, exported))
    content = json.loads(before.read_text())
    if "rope_parameters" not in content:
        assert after.read_bytes() == before.read_bytes()
    else:
        written = json.loads(after.read_text())
        older = FAMILIES[content["architectures"][0]].aliases.values()
        assert written.keys() - content.keys() <= {"rope_theta", "rope_scaling", *older}
        assert {key: written[key] for key in content} == content


def load_dense(directory: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers computes it, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    unscale_windowed_layers(model)
    return model.eval()


def build_student(
    directory: str | Path,
    *,
    tensor: int = 1,
    parallel: dict[str, Any] | None = None,
    megatron: Any = None,
    **config: Any,
) -> Any:
    """Creates process groups and a `Student` in fp32 with the weights of `directory`, by default with full fine-tuning.

    Call it on every rank. `parallel` contains further fields of `ParallelConfig`, `config` those of `StudentConfig`;
    `megatron` is a `MegatronConfig`. Sequences are split as `parallel` requires.
    """
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.megatron.student import Student
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    layout = ParallelConfig(**{"tensor": tensor, "sequence": "false", **(parallel or {})})
    initialize(layout, seed=1)
    source = HuggingFaceModel(directory)
    settings = StudentConfig(**{"precision": "fp32", "adaptation": "full", **config})
    return Student(source, settings, layout, seed=5, load_initial=source.load, megatron=megatron)


def whole_logits(gpt: Any, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [b, s, V] of a Megatron model without padding, on every rank of its tensor-parallel group."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = gpt(input_ids=ids, position_ids=positions, attention_mask=None)
        return gather_from_tensor_model_parallel_region(logits)[..., :vocab_size].clone()
