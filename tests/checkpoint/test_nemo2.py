"""A checkpoint that nemo_toolkit 2.7.3 wrote (see nemo2/make_checkpoint.py), read without NeMo's LLM collection."""

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

MADE = Path(__file__).parent / "nemo2" / "qwen3"


def _expected() -> tuple[Tensor, Tensor]:
    saved = load_file(MADE / "expected.safetensors")
    return saved["ids"], saved["logits"]


def _logits(rank: int, world_size: int) -> Tensor:
    """Of Megatron's model, loaded as `student.source` is."""
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(tensor=world_size), seed=1)
    source = open_source(str(MADE))
    student = StudentConfig(precision="fp32", adaptation="full")
    [model] = build_chunks(source.architecture.provider(), student, ParallelConfig(tensor=world_size))
    source.load([model.eval()])
    return whole_logits(model, _expected()[0], source.architecture.vocab_size)


def test_the_conversion_computes_in_transformers_what_nemo_computed(tmp_path):
    assert is_nemo2_checkpoint(MADE)
    source = open_source(str(MADE))
    to_huggingface(source, tmp_path / "hf", source.precision())
    ids, logits = _expected()
    with torch.no_grad():
        found = load_dense(tmp_path / "hf")(ids).logits
    assert found.shape[-1] == source.architecture.vocab_size == 396
    torch.testing.assert_close(found, logits[..., :396], rtol=0, atol=2e-5)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token is not None


@pytest.mark.parametrize("size", [1, 2])
def test_as_a_source_it_computes_what_nemo_computed(size):
    _, logits = _expected()
    for result in run_ranks(_logits, size, timeout=300.0):
        torch.testing.assert_close(result, logits[..., :396], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("_target_: nemo.collections.llm.gpt.model.qwen3.Qwen3Model", "_target_: os.system", "the class 'system'"),
        ("_target_: nemo.collections", "x: !!python/object/apply:os.system [touch mark]\n_target_: nemo", "refused"),
        ("hidden_size: 32", "hidden_size: null", "without hidden_size"),
    ],
)
def test_the_context_is_data_and_what_it_lacks_is_named(tmp_path, monkeypatch, old, new, named: str):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MADE, tmp_path / "made")
    file = tmp_path / "made" / "context" / "model.yaml"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))
    with pytest.raises(UserError, match=named):
        Nemo2Checkpoint(tmp_path / "made")
    assert not (tmp_path / "mark").exists()


def test_a_piece_that_is_missing_is_named(tmp_path):
    shutil.copytree(MADE, tmp_path / "made")
    for file in (tmp_path / "made" / "weights").glob("*.distcp"):
        file.unlink()
    tensors: Any = Nemo2Checkpoint(tmp_path / "made").tensors()
    with pytest.raises(UserError, match=r"\.distcp, from which .* cannot be read"):
        tensors["model.norm.weight"]
