"""OLMo-3's layers against transformers: gradients, decoding with a cache, adapters; logits are compared in
tests/checkpoint/test_conversion.py with those of the other architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_popsd.megatron.config import LoRAConfig
from nemo_popsd.rollout.engine import Request, SamplingParams
from tests.harness import run_ranks
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (2, 19), generator=torch.Generator().manual_seed(3))  # far beyond the window of 5
PROMPTS = [IDS[0, :4].tolist(), IDS[1, :9].tolist()]
LIMIT = 12
LAYERS = range(4)
SPLIT = {  # Megatron's parameter, transformers', and the dimension that tensor parallelism splits
    "self_attention.q_norm.weight": ("self_attn.q_norm.weight", 0),
    "self_attention.k_norm.weight": ("self_attn.k_norm.weight", 0),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight", None),
    "post_feedforward_layernorm.weight": ("post_feedforward_layernorm.weight", None),
}


def _weighting() -> Tensor:
    return torch.randn(2, 19, 203, generator=torch.Generator().manual_seed(5))


def _observe(rank: int, world_size: int, source: Path, sequence: str) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_popsd.rollout.megatron_engine import MegatronEngine

    parallel = {"tensor": world_size, "sequence": sequence}
    student = build_student(source, parallel=parallel)
    gpt = student.gpt
    ids = torch.nn.functional.pad(IDS, (0, 1))  # a length that two ranks divide; no token attends to a later one
    positions = torch.arange(20).expand(2, -1)
    logits = gather_from_tensor_model_parallel_region(gpt(input_ids=ids, position_ids=positions, attention_mask=None))
    (logits[:, :19, :203] * _weighting()).sum().backward()
    for parameter in gpt.parameters():
        if getattr(parameter, "sequence_parallel", False):  # as Megatron's `finalize_model_grads` does
            dist.all_reduce(parameter.grad, group=student.tp_group)
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    engine = MegatronEngine([gpt], vocab_size=203, batch_rows=8, cache_tokens=1 << 20, weights_version=lambda: 0)
    sampling = SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, max_response_tokens=LIMIT, stop_token_ids=frozenset()
    )
    rollouts = engine.generate([Request(prompt=prompt, seed=n) for n, prompt in enumerate(PROMPTS)], sampling)
    adapted = build_student(source, parallel=parallel, adaptation="lora", lora=LoRAConfig(rank=4, alpha=8.0))
    with torch.no_grad():
        at_start = whole_logits(adapted.gpt, ids, 203)
        with adapted.base.model() as [base]:
            frozen = whole_logits(base, ids, 203)
    return {
        "gradients": gradients,
        "split": {name for name, p in gpt.named_parameters() if getattr(p, "tensor_model_parallel", False)},
        "tokens": [rollout.response for rollout in rollouts],
        "adapters": sum(".adapter." in name for name, _ in adapted.gpt.named_parameters()),
        "adapted": at_start - frozen,
        "base": frozen - whole_logits(gpt, ids, 203),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("olmo3") / "hf", "olmo3")


@pytest.fixture(scope="module", params=[(1, "false"), (2, "false"), (2, "true")], ids=["tp1", "tp2", "tp2 sp"])
def observed(request, source, layers):
    world_size, sequence = request.param
    return run_ranks(_observe, world_size, source, sequence, layers=layers)


def test_gradients_equal_those_of_transformers(observed, source):
    dense = load_dense(source)
    (dense(IDS).logits * _weighting()).sum().backward()
    expected = {name: parameter.grad for name, parameter in dense.named_parameters()}
    size = len(observed)
    for rank, result in enumerate(observed):
        gradients = result["gradients"]
        last = gradients["decoder.final_layernorm.weight"]
        torch.testing.assert_close(last, expected["model.norm.weight"], rtol=1e-4, atol=1e-4)
        for layer in LAYERS:
            for ours, (theirs, dimension) in SPLIT.items():
                name, whole = f"decoder.layers.{layer}.{ours}", expected[f"model.layers.{layer}.{theirs}"]
                part = whole if dimension is None else whole.chunk(size, dimension)[rank]
                torch.testing.assert_close(gradients[name], part, rtol=1e-4, atol=2e-4 * float(whole.abs().max()))
                assert (name in result["split"]) == (dimension is not None), name


def test_cached_decoding_generates_the_tokens_of_transformers(observed, source):
    dense = load_dense(source)
    for row, prompt in enumerate(PROMPTS):
        tokens = dense.generate(
            torch.tensor([prompt]), max_new_tokens=LIMIT, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for result in observed:
            assert result["tokens"][row] == tokens[0, len(prompt) :].tolist()


def test_adapters_start_at_the_base(observed):
    for result in observed:
        assert result["adapters"] == 2 * 4 * len(LAYERS)
        assert torch.equal(result["adapted"], torch.zeros_like(result["adapted"]))
        torch.testing.assert_close(result["base"], torch.zeros_like(result["base"]), rtol=0, atol=1e-5)


def _too_many_ranks(rank: int, world_size: int, source: Path) -> str:
    try:
        build_student(source, tensor=world_size)
    except Exception as error:
        return f"{error} {error.__cause__} {error.__context__}"
    return ""


def test_key_heads_that_are_split_over_ranks_are_refused(tmp_path):
    source = save_tiny_model(tmp_path / "hf", "olmo3", num_key_value_heads=1)
    for message in run_ranks(_too_many_ranks, 2, source):
        assert "got 1 key-value heads with parallel.tensor=2" in message
