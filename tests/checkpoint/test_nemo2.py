"""Reads a checkpoint that nemo_toolkit 2.7.3 wrote (nemo2/make_checkpoint.py), without NeMo's LLM collection."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_popsd.checkpoint.conversion import to_huggingface
from nemo_popsd.checkpoint.nemo2 import Nemo2Checkpoint, is_nemo2_checkpoint
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import load_dense, whole_logits

CHECKPOINT = Path(__file__).parent / "nemo2" / "qwen3"


def _expected() -> tuple[Tensor, Tensor]:
    saved = load_file(CHECKPOINT / "expected.safetensors")
    return saved["ids"], saved["logits"]


def _logits(rank: int, world_size: int) -> Tensor:
    """Logits of Megatron's model, loaded as `student.source` is."""
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(tensor=world_size), seed=1)
    source = open_source(str(CHECKPOINT))
    student = StudentConfig(precision="fp32", adaptation="full")
    [model] = build_chunks(source.architecture.provider(), student, ParallelConfig(tensor=world_size, sequence="false"))
    source.load([model.eval()])
    return whole_logits(model, _expected()[0], source.architecture.vocab_size)


def test_transformers_computes_the_logits_of_nemo_after_the_conversion(tmp_path):
    assert is_nemo2_checkpoint(CHECKPOINT)
    source = open_source(str(CHECKPOINT))
    to_huggingface(source, tmp_path / "hf", source.precision())
    ids, logits = _expected()
    with torch.no_grad():
        converted = load_dense(tmp_path / "hf")(ids).logits
    assert converted.shape[-1] == source.architecture.vocab_size == 396
    torch.testing.assert_close(converted, logits[..., :396], rtol=0, atol=2e-5)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token is not None


@pytest.mark.parametrize("size", [1, 2])
def test_megatron_computes_the_logits_of_nemo(size):
    _, logits = _expected()
    for result in run_ranks(_logits, size, timeout=300.0):
        torch.testing.assert_close(result, logits[..., :396], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_target_: nemo.collections.llm.gpt.model.qwen3.Qwen3Model", "_target_: os.system", "the class 'system'"),
        ("_target_: nemo.collections", "x: !!python/object/apply:os.system [touch mark]\n_target_: nemo", "unreadable"),
        ("hidden_size: 32", "hidden_size: null", "without hidden_size"),
    ],
)
def test_code_and_missing_sizes_in_the_context_are_refused(tmp_path, monkeypatch, old, new, message: str):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, tmp_path / "copy")
    file = tmp_path / "copy" / "context" / "model.yaml"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Nemo2Checkpoint(tmp_path / "copy")
    assert not (tmp_path / "mark").exists()


def test_a_missing_file_of_weights_is_named(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "copy")
    for file in (tmp_path / "copy" / "weights").glob("*.distcp"):
        file.unlink()
    tensors: Any = Nemo2Checkpoint(tmp_path / "copy").tensors()
    with pytest.raises(UserError, match=r"\.distcp, from which .* cannot be read"):
        tensors["model.norm.weight"]
