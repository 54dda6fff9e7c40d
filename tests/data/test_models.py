"""Where the model of a run is: embedded, on disk, or in the cache of the Hub, whose snapshots are links to blobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_popsd.data.models import missing_model, model_path
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.embedded.names import asset

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "Owner/Tiny-1B"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model as `hf download` leaves it in the cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "models--Owner--Tiny-1B"
    place = folder / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    for file in asset("nemo_popsd:tiny_reasoner").iterdir():
        blob = folder / "blobs" / f"of-{file.name}"
        blob.write_bytes(file.read_bytes())
        (place / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return place


def test_the_id_of_a_model_is_its_snapshot_and_a_path_comes_first(snapshot: Path, tmp_path: Path) -> None:
    assert model_path(NAME) == snapshot
    assert load_tokenizer(model_path(NAME)).vocab_size > 0
    (tmp_path / NAME).mkdir(parents=True)
    assert model_path(NAME) == Path(NAME)
    assert model_path("nemo_popsd:tiny_reasoner") == asset("nemo_popsd:tiny_reasoner")


def test_the_cache_is_below_the_home_of_hugging_face(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(snapshot.parents[3]))
    assert model_path(NAME) == snapshot.parents[3] / "hub" / "models--Owner--Tiny-1B" / "snapshots" / COMMIT


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_an_interrupted_download_does_not_count_and_what_it_lacks_is_named(snapshot: Path, file: str) -> None:
    (snapshot / file).unlink()
    assert model_path(NAME) == Path(NAME)
    message = str(missing_model(NAME, setting="student.source"))
    assert f"whose snapshot lacks {file}" in message
    assert f"download it: hf download {NAME}" in message


def test_every_shard_of_the_index_must_be_there(snapshot: Path) -> None:
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert "lacks model-2.safetensors" in str(missing_model(NAME, setting="student.source"))
    (snapshot / "model-2.safetensors").touch()
    assert model_path(NAME) == snapshot
    index.write_text("{")
    assert model_path(NAME) == Path(NAME)


@pytest.mark.parametrize("commit", ["../../../elsewhere", "main", ""])
def test_a_reference_that_is_not_a_commit_is_not_followed(snapshot: Path, commit: str) -> None:
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert model_path(NAME) == Path(NAME)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("Owner/Other", "download it: hf download Owner/Other; or set student.source"),
        ("models/Qwen3-8B", "hf download OWNER/Qwen3-8B --local-dir models/Qwen3-8B"),
        ("/models/Qwen3-8B", "tiny_reasoner; set student.source"),
        ("", "got student.source=''"),
    ],
)
def test_a_model_that_is_not_there(snapshot: Path, source: str, fix: str) -> None:
    message = str(missing_model(source, setting="student.source"))
    assert fix in message
    assert ("hf download" in message) == ("hf download" in fix)
