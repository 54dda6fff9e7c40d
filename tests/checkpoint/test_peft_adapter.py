"""`popsd export --adapter`: PEFT on the original model with the exported adapters gives the logits of the student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_popsd.checkpoint.conversion import huggingface_to_nemo, to_huggingface
from nemo_popsd.checkpoint.digest import huggingface_digest
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.peft_adapter import write_peft_adapter
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.files.ownership import MARK
from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
from tests.harness import run_ranks
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (2, 9), generator=torch.Generator().manual_seed(3))
KINDS = {"qwen3_tied": {}, "qwen2": {"targets": ["linear_qkv", "linear_fc2"]}, "llama": {}}


def _save(rank: int, world_size: int, sources: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Saves students whose adapters differ from 0 in both factors, and returns their logits."""
    logits = {}
    for kind, source in sources.items():
        lora = LoRAConfig(rank=4, alpha=6.0, **KINDS[kind])
        student = build_student(source, tensor=world_size, adaptation="lora", lora=lora)
        shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8 + rank)
        with torch.no_grad():
            for name, parameter in student.gpt.named_parameters():
                if ".adapter." in name:
                    sharded = getattr(parameter, "tensor_model_parallel", False)
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=own if sharded else shared))
        config = StudentConfig(source=str(source), precision="fp32", adaptation="lora", lora=lora)
        tree = to_dict_config(PopsdConfig(student=config))
        content = Content(
            models=student.chunks,
            architecture=HuggingFaceModel(source),
            config=tree,
            step=5,
            base={"source": str(source), "fingerprint": huggingface_digest(source)},
            adapters_only=kind != "llama",
        )
        save_nemo(folder / kind, content)
        logits[kind] = whole_logits(student.gpt, IDS, 203)
    return logits


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def saved(request, tmp_path_factory, layers):
    folder = tmp_path_factory.mktemp("adapters")
    sources = {kind: save_tiny_model(folder / f"{kind}_source", kind) for kind in KINDS}
    return folder, sources, run_ranks(_save, request.param, sources, folder, layers=layers)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_the_original_model_gives_the_logits_of_the_student(saved, kind, tmp_path):
    from peft import PeftModel

    folder, sources, logits = saved
    output = tmp_path / "adapter"
    for _ in range(2):  # the second replaces the first
        write_peft_adapter(NemoCheckpoint(folder / kind), output)
    base = load_dense(sources[kind])
    with torch.no_grad():
        before = base(IDS).logits
        after = PeftModel.from_pretrained(base, output).eval()(IDS).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, logits[kind], rtol=0, atol=2e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    content = json.loads((output / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(sources[kind])
    linears = {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert set(content["target_modules"]) == (
        linears if kind == "qwen2" else linears | {"o_proj", "gate_proj", "up_proj"}
    )
    assert len(load_file(output / "adapter_model.safetensors")) == 2 * 2 * len(content["target_modules"])
    assert {path.name for path in output.iterdir()} == {
        MARK,
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_merges_the_adapters(saved, kind, tmp_path):
    """Also for checkpoints without the weights of the base, which are read from the run's source."""
    folder, _, logits = saved
    to_huggingface(open_source(str(folder / kind)), tmp_path / "hf", "fp32")
    with torch.no_grad():
        torch.testing.assert_close(load_dense(tmp_path / "hf")(IDS).logits, logits[kind], rtol=0, atol=2e-5)


def _command(rank: int, world_size: int, nemo: Path, output: Path) -> None:
    from nemo_popsd.commands.conversion import nemo_to_hf

    options = {"precision": None, "shard_bytes": 1 << 20, "trust_remote_code": False}
    nemo_to_hf(str(nemo), str(output), verifies=True, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_converts_and_verifies_adapters_on_two_ranks(saved, tmp_path):
    folder, _, logits = saved
    run_ranks(_command, 2, folder / "qwen3_tied", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with torch.no_grad():
        torch.testing.assert_close(load_dense(tmp_path / "hf")(IDS).logits, logits["qwen3_tied"], rtol=0, atol=2e-5)


def test_another_base_is_refused(saved, tmp_path):
    folder, sources, _ = saved
    kept = tmp_path / "kept"
    sources["qwen2"].rename(kept)
    try:
        save_tiny_model(sources["qwen2"], "qwen2", seed=9)
        with pytest.raises(UserError, match="the base that it was trained from"):
            open_source(str(folder / "qwen2")).tensors()
    finally:
        shutil.rmtree(sources["qwen2"])
        kept.rename(sources["qwen2"])


def _convert(rank: int, world_size: int, source: Path, output: Path) -> None:
    huggingface_to_nemo(HuggingFaceModel(source), output, "fp32")


def test_checkpoints_without_adapters_and_adapters_on_experts_are_refused(tmp_path):
    run_ranks(_convert, 1, save_tiny_model(tmp_path / "moe", "qwen3_moe"), tmp_path / "nemo")
    with pytest.raises(UserError, match="adaptation=full"):
        write_peft_adapter(NemoCheckpoint(tmp_path / "nemo"), tmp_path / "out")
    checkpoint = NemoCheckpoint(tmp_path / "nemo")
    checkpoint.config.student.adaptation = "lora"
    with pytest.raises(UserError, match="experts"):
        write_peft_adapter(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
