"""Models on Transformer Engine: logits equal those of transformers; what its layers cannot compute is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import KINDS, build_student, load_dense, save_tiny_model, whole_logits

pytestmark = [on_transformer_engine, pytest.mark.slow]
IDS = torch.randint(0, 203, (3, 17), generator=torch.Generator().manual_seed(2))
EVERY_KIND = (*KINDS, "qwen3_moe", "mistral")
FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")


def _logits(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Of each kind with fused attention (a GPU's in bf16) and without (its in fp32), and what the layers are."""
    seen: dict[str, Any] = {}
    for kind in EVERY_KIND:
        gpt = build_student(folder / kind).gpt
        seen[kind] = {
            "core": type(gpt.decoder.layers[0].self_attention.core_attention).__name__,
            "fusions": {name: getattr(gpt.config, name) for name in FUSIONS},
        }
        for name, fused in (("unfused", "0"), ("fused", "1")):  # Megatron requires the last value
            os.environ["NVTE_FUSED_ATTN"] = fused
            _choose_attention_again()
            seen[kind][name] = whole_logits(gpt.eval(), IDS, 203)
    return seen


def _choose_attention_again() -> None:
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    dot_product_attention._attention_backends["backend_selection_requires_update"] = True


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in EVERY_KIND:
        save_tiny_model(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def seen(models: Path) -> dict[str, Any]:
    return run_ranks(_logits, 1, models, layers=TRANSFORMER_ENGINE, timeout=300.0)[0]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_logits_are_those_of_transformers(models: Path, seen: dict[str, Any], kind: str) -> None:
    with torch.no_grad():
        expected = load_dense(models / kind)(IDS).logits
    assert seen[kind]["core"] == "TEDotProductAttention"
    for name in ("fused", "unfused"):
        torch.testing.assert_close(seen[kind][name], expected, rtol=0, atol=2e-5)
    assert not torch.equal(seen[kind]["fused"], seen[kind]["unfused"]), "two attentions"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_all_fusions_are_on(seen: dict[str, Any], kind: str) -> None:
    """OLMo-3 has YaRN's scale in the query, so its rotations are also fused."""
    assert seen[kind]["fusions"] == dict.fromkeys(FUSIONS, True)


def _refusals(rank: int, world_size: int, models: Path) -> dict[str, str]:
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.errors import UserError
    from nemo_popsd.megatron import build, context_limits, limits
    from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig

    context_limits.PRECISIONS_OF_CONTEXT = ("bf16",)
    build.choose_layer_spec = lambda *_: (_ for _ in ()).throw(AssertionError("not refused"))
    attention = LoRAConfig(targets=["linear_qkv", "linear_proj"])
    cases = {
        "experts": ("qwen3_moe", {}, {}),
        "experts, attention alone": ("qwen3_moe", {"lora": attention}, {}),
        "experts, full": ("qwen3_moe", {"adaptation": "full"}, {}),
        "window": ("olmo3", {}, {"context": 2}),
        "window, whole": ("olmo3", {}, {}),
        "fp32": ("qwen3", {"precision": "fp32"}, {"context": 2}),
        "fp32, whole": ("qwen3", {"precision": "fp32"}, {}),
        "bf16": ("qwen3", {}, {"context": 2}),
    }
    said: dict[str, str] = {}
    limits.logger.warning = lambda text: said.setdefault("warning", text)  # type: ignore[method-assign,assignment]
    for name, (kind, student, parallel) in cases.items():
        try:
            build.build_chunks(
                HuggingFaceModel(models / kind).provider(), StudentConfig(**student), ParallelConfig(**parallel)
            )
        except (UserError, AssertionError) as error:
            said[name] = str(error)
    return said


def test_unsupported_layers_are_refused_before_a_model_is_built(models: Path) -> None:
    [said] = run_ranks(_refusals, 1, models, layers=TRANSFORMER_ENGINE)
    assert "student.lora.targets with linear_fc1, linear_fc2 for a mixture of 4 experts" in said["experts"]
    assert "set student.lora.targets=[linear_qkv,linear_proj]" in said["experts"]
    assert "layers with sliding windows (OLMo-3's) with parallel.context=2" in said["window"]
    assert "student.precision=fp32 with parallel.context=2" in said["fp32"]
    assert "NVIDIA_TF32_OVERRIDE=0" in said["warning"]
    for name in ("experts, attention alone", "experts, full", "window, whole", "fp32, whole", "bf16"):
        assert said[name] == "not refused", name
