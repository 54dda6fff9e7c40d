"""Restrictions and side effects of Transformer Engine's modules for which the project has a workaround."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (1, 8), generator=torch.Generator().manual_seed(2))
ONE_GROUP = {"num_key_value_heads": 1}


def _single_tokens(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """A prefill and a micro-batch of one token, in a model with one key-value head."""
    from nemo_popsd.megatron import decoding, microbatches
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence

    student = build_student(model)
    sequence = ContextSequence([int(IDS[0, 0])], [])

    def decoded() -> torch.Tensor:
        decoder = decoding.SlotDecoder(student.chunks, slots=1, capacity=8)
        with torch.no_grad(), decoder.open():
            decoder.prefill(torch.tensor([0]), IDS[:, :1])
            logits = decoder.next_logits(IDS[:, 1], torch.tensor([1]), 2)
        assert logits is not None
        return logits[:, :203].clone()

    def forward(packed: bool) -> tuple[int, int]:
        batches = student_batches(student.chunks, [sequence], 1, packed=packed)
        frozen_hidden_states(student.chunks, batches)
        return batches[0].shape

    seen: dict[str, Any] = {"logits": decoded(), "padded": forward(False), "packed": forward(True), "raised": []}
    decoding.FEWEST_TOKENS = microbatches.FEWEST_TOKENS = 1
    for call in (decoded, lambda: forward(False)):
        try:
            call()
        except Exception as error:
            seen["raised"].append(str(error))
    return seen


@on_transformer_engine
def test_one_token_with_one_key_value_head_is_computed(tmp_path: Path) -> None:
    """Transformer Engine cannot determine the memory layout of a single token; a token of padding is added."""
    model = save_tiny_model(tmp_path / "model", "qwen3", **ONE_GROUP)
    [seen] = run_ranks(_single_tokens, 1, model, layers=TRANSFORMER_ENGINE)
    with torch.no_grad():
        expected = load_dense(model)(IDS[:, :2]).logits[:, 1]
    torch.testing.assert_close(seen["logits"], expected, rtol=0, atol=2e-5)
    assert seen["padded"] == seen["packed"] == (2, 1)
    assert len(seen["raised"]) == 2, "without the padding both are refused"
    assert all("layout is not supported" in message for message in seen["raised"]), seen["raised"]


def _modules_of_lora(rank: int, world_size: int) -> tuple[str, bool, bool]:
    import sys

    from megatron.bridge.peft import lora_layers
    from megatron.bridge.peft import utils as peft_utils

    from nemo_popsd.runtime.cpu import adapt_megatron
    from nemo_popsd.runtime.local_layers import transformer_engine_imports

    adapt_megatron()
    engine: Any = lora_layers.te
    real = engine is sys.modules.get("transformer_engine.pytorch")
    assert transformer_engine_imports() == real
    return str(getattr(engine, "__file__", None)), real, bool(peft_utils.HAVE_TE)


@pytest.mark.parametrize(
    "layers", [LOCAL, pytest.param(TRANSFORMER_ENGINE, marks=on_transformer_engine)], ids=["absent", "importable"]
)
def test_lora_wraps_the_real_transformer_engine_where_it_imports(layers: str) -> None:
    """The stand-in for the import of Megatron-Bridge's LoRA is for machines without Transformer Engine alone."""
    [(file, real, believed)] = run_ranks(_modules_of_lora, 1, layers=layers)
    assert real == believed == (layers == TRANSFORMER_ENGINE)
    assert ("transformer_engine/pytorch/__init__.py" in file) == real


VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def _with_variables(rank: int, world_size: int, model: Path) -> dict[str, str]:
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    assert not before, f"set before a model is built: {before}"
    seen = {}
    for name in VARIABLES:
        os.environ[name] = "0"
        try:
            build_student(model)
        except UserError as error:
            seen[name] = str(error)
        del os.environ[name]
    whole_logits(build_student(model).gpt, IDS, 203)
    for name in VARIABLES:  # Megatron sets them from the model's configuration
        seen[f"{name} afterwards"] = os.environ[name]
    build_student(model)
    return seen


@on_transformer_engine
def test_variables_that_choose_the_attention_are_refused_by_name(tmp_path: Path) -> None:
    """Megatron would fail with an assertion about a setting that a run does not have."""
    [seen] = run_ranks(_with_variables, 1, save_tiny_model(tmp_path / "model"), layers=TRANSFORMER_ENGINE)
    for name in VARIABLES:
        assert f"got {name}=0" in seen[name]
        assert f"unset {name}" in seen[name]
        assert seen[f"{name} afterwards"] == "1"


def test_nothing_in_the_project_sets_the_variables() -> None:
    root = Path(__file__).parents[2]
    folders = ("nemo_popsd", "slurm", "docker", "conf", "experiments")
    files = [root / "Dockerfile", *(file for name in folders for file in (root / name).rglob("*") if file.is_file())]
    assert len(files) > 100
    for file in files:
        if file.suffix in (".py", ".sh", ".yaml", ".slurm", ".sbatch") or file.name == "Dockerfile":
            text = file.read_text()
            for name in VARIABLES:
                assert f"{name}=" not in text, file
                assert f'environ["{name}"]' not in text, file
