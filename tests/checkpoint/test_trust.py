"""Checkpoints made to run code when they are read."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
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


def test_code_in_a_model_directory_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}, "architectures": ["Evil"]}'
    )
    (tmp_path / "model" / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    with pytest.raises(UserError, match="no code from a model's directory is ever run"):
        HuggingFaceModel(tmp_path / "model")
    assert not mark.exists()
