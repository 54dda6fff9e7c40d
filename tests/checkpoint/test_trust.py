"""Loading runs no code: crafted directories whose code would leave a mark, each refused or read without running it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors, Piece, write_distributed_tensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.errors import UserError
from tests.tiny_models import save_tiny_model

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self._mark,))


def _weights(directory: Path) -> Path:
    directory.mkdir()
    piece = Piece(key="a", position=(), shape=(3, 2), dtype=torch.float32, make=lambda: torch.ones(3, 2))
    write_distributed_tensors(directory, [piece])
    return directory


def test_pickles_in_place_of_safetensors_are_not_read(tmp_path):
    source = save_tiny_model(tmp_path / "model", "qwen2")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(tmp_path / "mark")))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        HuggingFaceModel(source)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_python_beside_a_configuration_runs_only_when_it_is_trusted(tmp_path, monkeypatch, trusted):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    code += "from transformers import Qwen2Config\nclass Strange(Qwen2Config):\n    model_type = 'strange'\n"
    (folder / "configuration_strange.py").write_text(code)
    content = {
        "model_type": "strange",
        "architectures": ["StrangeForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_strange.Strange"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="StrangeForCausalLM" if trusted else "refused"):
        HuggingFaceModel(folder, trust_remote_code=trusted)
    assert (tmp_path / "mark").exists() == trusted


def test_an_index_of_weights_that_names_code_is_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    assert torch.equal(DistributedTensors(weights).read("a"), torch.ones(3, 2))
    index = pickle.loads((weights / ".metadata").read_bytes())
    index.planner_data = _Touch(tmp_path / "mark")
    (weights / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"names .*touch.*describes no tensor"):
        DistributedTensors(weights)
    assert not (tmp_path / "mark").exists()
    pickle.loads((weights / ".metadata").read_bytes())
    assert (tmp_path / "mark").exists(), "the trap would have worked"


def test_code_in_place_of_a_tensor_and_files_elsewhere_are_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    file = weights / "__0_0.distcp"
    whole = file.read_bytes()
    trap = tmp_path / "trap.pt"
    torch.save(_Touch(tmp_path / "mark"), trap)
    file.write_bytes(trap.read_bytes().ljust(len(whole), b"\0")[: len(whole)] if len(whole) else b"")
    with pytest.raises(UserError, match="cannot be read"):
        DistributedTensors(weights).read("a")
    assert not (tmp_path / "mark").exists()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        DistributedTensors(weights).read("a")
    file.rename(tmp_path / "elsewhere.distcp")
    file.symlink_to(tmp_path / "elsewhere.distcp")
    with pytest.raises(UserError, match="points outside"):
        DistributedTensors(weights).read("a")
    source = save_tiny_model(tmp_path / "model", "qwen2")
    index = {"metadata": {}, "weight_map": {"a": "../elsewhere.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is elsewhere"):
        HuggingFaceModel(source)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' in Qwen3ForCausalLM"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("llama3", {"rope_scaling": _LLAMA3}, "only the factor"),
        ("olmo3", {"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_what_megatron_would_silently_compute_otherwise_is_refused(tmp_path, kind, fields, named):
    source = save_tiny_model(tmp_path / "model", kind, num_hidden_layers=1)
    HuggingFaceModel(source)
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **fields}))
    with pytest.raises(UserError, match=named):
        HuggingFaceModel(source)
