"""Loading runs no code: what would leave a mark if it ran is refused, or read without running it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors, Piece, write_distributed_tensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.verification import _transformers_logits
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model


class _Payload:
    """Unpickled, it makes a file: what an attacker's command would do."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


def _metadata(weights: Path) -> Any:
    with (weights / ".metadata").open("rb") as file:
        return pickle.load(file)


def _in_metadata(weights: Path, mark: Path) -> None:
    """The whole of `.metadata` is the payload."""
    (weights / ".metadata").write_bytes(pickle.dumps(_Payload(mark)))


def _inside_metadata(weights: Path, mark: Path) -> None:
    """The payload hides in metadata that is right otherwise."""
    metadata = _metadata(weights)
    metadata.planner_data = _Payload(mark)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_common(weights: Path, mark: Path) -> None:
    torch.save({"args": _Payload(mark)}, weights / "common.pt")


def _as_bytes(weights: Path, mark: Path) -> None:
    """A tensor that the metadata calls an object, for torch to read without restriction (default_planner.py:387)."""
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
    told = {}
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    for attack in ATTACKS:
        weights = folder / attack.__name__
        shutil.copytree(folder / "weights", weights)
        attack(weights, folder / f"{attack.__name__}.ran")
        try:
            load_weights(student.chunks, weights)
        except UserError as error:
            told[attack.__name__] = str(error)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert filesystem.pickle is pickle
    load_weights(student.chunks, folder / "weights")
    return told


def test_no_code_is_run_and_each_attack_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "hf")
    [told] = run_ranks(_attack, 1, source, tmp_path)
    assert not list(tmp_path.glob("*.ran"))
    assert set(told) == {attack.__name__ for attack in ATTACKS}
    assert "posix.system" in told["_in_metadata"]
    assert "posix.system" in told["_inside_metadata"]
    assert "embedding.word_embeddings.weight" in told["_as_bytes"]
    for text in told.values():
        assert "\n" not in text.strip() or "Weights only load failed" in text


def test_the_attacks_would_work_on_a_reader_that_trusts(tmp_path: Path) -> None:
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
def test_python_beside_a_configuration_runs_only_where_it_is_trusted_and_compared(tmp_path, monkeypatch, trusted):
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
    assert not (tmp_path / "mark").exists(), "reading runs nothing"
    model.copy_artifacts(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "modeling_strange.py").exists()
    _transformers_logits(model, [1, 2, 3], torch.float32, True)
    assert (tmp_path / "mark").exists()


def test_an_index_of_weights_that_names_code_is_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    assert torch.equal(DistributedTensors(weights).read("a"), torch.ones(3, 2))
    index = pickle.loads((weights / ".metadata").read_bytes())
    index.planner_data = _Payload(tmp_path / "mark")
    (weights / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"names posix\.system"):
        DistributedTensors(weights)
    assert not (tmp_path / "mark").exists()
    pickle.loads((weights / ".metadata").read_bytes())
    assert (tmp_path / "mark").exists(), "the trap would have worked"


def test_code_in_place_of_a_tensor_and_files_elsewhere_are_refused(tmp_path):
    weights = _weights(tmp_path / "weights")
    file = weights / "__0_0.distcp"
    whole = file.read_bytes()
    trap = tmp_path / "trap.pt"
    torch.save(_Payload(tmp_path / "mark"), trap)
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
