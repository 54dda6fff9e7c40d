"""Loading runs no code from files: a payload that would leave a mark is refused, or read without being run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors, Piece, write_distributed_tensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.trust import load_metadata
from nemo_popsd.checkpoint.verification import _transformers_logits
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model


class _Payload:
    """Unpickling it runs a command that makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


def _metadata(weights: Path) -> Any:
    with (weights / ".metadata").open("rb") as file:
        return pickle.load(file)


def _in_metadata(weights: Path, mark: Path) -> None:
    """Replaces `.metadata` by the payload."""
    (weights / ".metadata").write_bytes(pickle.dumps(_Payload(mark)))


def _inside_metadata(weights: Path, mark: Path) -> None:
    """Adds the payload to otherwise valid metadata."""
    metadata = _metadata(weights)
    metadata.planner_data = _Payload(mark)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_common(weights: Path, mark: Path) -> None:
    torch.save({"args": _Payload(mark)}, weights / "common.pt")


def _as_bytes(weights: Path, mark: Path) -> None:
    """Declares a tensor as bytes, which `DefaultLoadPlanner.load_bytes` reads with an unrestricted `torch.load`."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = _metadata(weights)
    name = "embedding.word_embeddings.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == name)
    torch.save(_Payload(mark), weights / "payload.distcp")
    info.relative_path, info.offset, info.length = "payload.distcp", 0, (weights / "payload.distcp").stat().st_size
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != name}
    metadata.storage_data[type(index)(name)] = info
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS: tuple[Callable[[Path, Path], None], ...] = (_in_metadata, _inside_metadata, _in_common, _as_bytes)


def _attack(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, str]:
    from torch.distributed.checkpoint import filesystem

    from nemo_popsd.checkpoint.weights import StagedWeights, every_parameter, load_weights

    student = build_student(source)
    (folder / "weights").mkdir()
    staged = StagedWeights(student.chunks, folder / "weights", which=every_parameter, copy=False)
    staged.write()
    staged.finish()
    messages = {}
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    for attack in ATTACKS:
        weights = folder / attack.__name__
        shutil.copytree(folder / "weights", weights)
        attack(weights, folder / f"{attack.__name__}.ran")
        try:
            load_weights(student.chunks, weights)
        except UserError as error:
            messages[attack.__name__] = str(error)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert filesystem.pickle is pickle
    load_weights(student.chunks, folder / "weights")
    return messages


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_metadata_with_a_path_is_read_by_each_python(module: str) -> None:
    """Python 3.13 pickles paths as those of another module, which other versions do not have."""
    content = Metadata(state_dict_metadata={}, storage_meta=StorageMeta(checkpoint_id=Path("a")))
    text = re.sub(rb"cpathlib[._a-z]*\n", f"c{module}\n".encode(), pickle.dumps(content, protocol=2))
    assert f"c{module}\nPosixPath".encode() in text
    assert load_metadata(io.BytesIO(text)) == content


def test_no_code_is_run_and_each_attack_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "hf")
    [messages] = run_ranks(_attack, 1, source, tmp_path)
    assert not list(tmp_path.glob("*.ran"))
    assert set(messages) == {attack.__name__ for attack in ATTACKS}
    assert "posix.system" in messages["_in_metadata"]
    assert "posix.system" in messages["_inside_metadata"]
    assert "embedding.word_embeddings.weight" in messages["_as_bytes"]
    for text in messages.values():
        assert "\n" not in text.strip() or "Weights only load failed" in text


def test_the_payload_runs_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def _weights(directory: Path) -> Path:
    directory.mkdir()
    piece = Piece(key="a", position=(), shape=(3, 2), dtype=torch.float32, make=lambda: torch.ones(3, 2))
    write_distributed_tensors(directory, [piece])
    return directory


def test_pickles_in_place_of_safetensors_are_not_read(tmp_path):
    source = save_tiny_model(tmp_path / "model", "qwen2")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(tmp_path / "mark")))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        HuggingFaceModel(source)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_python_files_of_a_model_run_only_if_they_are_trusted_and_verified(tmp_path, monkeypatch, trusted):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_model(tmp_path / "model", "qwen2", num_hidden_layers=1)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    code += "from transformers import Qwen2ForCausalLM\nclass Strange(Qwen2ForCausalLM):\n    pass\n"
    (folder / "modeling_strange.py").write_text(code)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_strange.Strange"}
    (folder / "config.json").write_text(json.dumps(content))
    if not trusted:
        with pytest.raises(UserError, match=r"auto_map in config\.json"):
            HuggingFaceModel(folder)
        return
    model = HuggingFaceModel(folder, trust_remote_code=True)
    assert not (tmp_path / "mark").exists(), "reading has run code"
    model.copy_artifacts(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "modeling_strange.py").exists()
    _transformers_logits(model, [1, 2, 3], torch.float32, True)
    assert (tmp_path / "mark").exists()


def test_an_index_of_weights_that_refers_to_code_is_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    assert torch.equal(DistributedTensors(weights).read("a"), torch.ones(3, 2))
    index = pickle.loads((weights / ".metadata").read_bytes())
    index.planner_data = _Payload(tmp_path / "mark")
    (weights / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"refers to posix\.system"):
        DistributedTensors(weights)
    assert not (tmp_path / "mark").exists()
    pickle.loads((weights / ".metadata").read_bytes())
    assert (tmp_path / "mark").exists(), "the payload does not run"


def test_code_in_place_of_a_tensor_and_files_outside_the_directory_are_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    file = weights / "__0_0.distcp"
    content = file.read_bytes()
    payload = tmp_path / "payload.pt"
    torch.save(_Payload(tmp_path / "mark"), payload)
    file.write_bytes(payload.read_bytes().ljust(len(content), b"\0")[: len(content)])
    with pytest.raises(UserError, match="cannot be read"):
        DistributedTensors(weights).read("a")
    assert not (tmp_path / "mark").exists()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        DistributedTensors(weights).read("a")
    file.rename(tmp_path / "outside.distcp")
    file.symlink_to(tmp_path / "outside.distcp")
    with pytest.raises(UserError, match=r"names the file .* outside the directory"):
        DistributedTensors(weights).read("a")
    source = save_tiny_model(tmp_path / "model", "qwen2")
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is outside the directory"):
        HuggingFaceModel(source)
