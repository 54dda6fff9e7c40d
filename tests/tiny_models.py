"""Tiny random models in Hugging Face format, with a tokenizer of bytes: made on the spot, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.data import small

VOCAB_SIZE = 267
"""Divides by no tensor-parallel size: Megatron pads it to 384 on one rank and to 512 on two."""


def save_qwen3(
    directory: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 32,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    tokenizer: bool = True,
) -> Path:
    """Write a random Qwen3 into `directory`: two key-value heads, norms that are not 1, logits of spread about 1.5."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(generator_state)
    model.save_pretrained(directory)
    if tokenizer:
        made = small.tokenizer()
        made.save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": made.eos_token_id}))
    return directory


def build_student(directory: str | Path, world_size: int, *, tensor: int = 1, recompute: bool = False, **config: Any):
    """Process groups, and a `Student` in fp32 with the weights of `directory`; full fine-tuning unless `config` says.

    Call it in a rank. `config` are further fields of `StudentConfig`.
    """
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.megatron.config import ParallelConfig, StudentConfig
    from nemo_popsd.megatron.student import Student
    from nemo_popsd.runtime.distributed import initialize

    initialize(tensor_parallel=tensor, seed=1)
    source = HuggingFaceModel(directory)
    fields = {"precision": "fp32", "adaptation": "full", "recompute": recompute, **config}
    return Student(source, StudentConfig(**fields), ParallelConfig(tensor=tensor), seed=5, load_initial=source.load)


def whole_logits(gpt: Any, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits of a Megatron model over the true vocabulary, [b, s, V], on every rank of its tensor-parallel group."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = gpt(input_ids=ids, position_ids=positions, attention_mask=None)
        return gather_from_tensor_model_parallel_region(logits)[..., :vocab_size].clone()
