"""A model with a missing, duplicate or unexpected tensor is refused before anything is written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from nemo_popsd.checkpoint.completeness import expected_shapes
from nemo_popsd.checkpoint.conversion import huggingface_to_nemo, to_huggingface
from nemo_popsd.checkpoint.digest import huggingface_digest
from nemo_popsd.checkpoint.distributed_tensors import Piece, write_distributed_tensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import file_digests, list_files, read_manifest, write_manifest
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import KINDS, build_student, load_dense, save_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(folder / kind, kind) for kind in (*KINDS, "qwen3_moe", "mistral")}


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe", "mistral"])
def test_the_expected_tensors_are_those_that_transformers_saves(models: dict[str, Path], kind: str) -> None:
    tensors = load_file(models[kind] / WEIGHTS)
    config = load_dense(models[kind]).config
    assert expected_shapes(config) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_expected_tensors_of_a_large_model_are_computed_within_seconds() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=94, num_experts=128, hidden_size=4096, architectures=["Qwen3Moe"])
    expected_shapes(config)
    start = time.process_time()
    assert len(expected_shapes(config)) == 3 + 94 * (128 * 3 + 9)
    assert time.process_time() - start < 5


def _without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


_DOWN, _EMBEDDING = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "none": (lambda tensors: {}, r"no tensor lm_head\.weight, .* and \d+ more"),
    "norm": (_without("model.norm.weight"), r"no tensor model\.norm\.weight"),
    "down": (_without(_DOWN), r"no tensor model\.layers\.1\.mlp\.down_proj\.weight"),
    "q": (_without("layers.0.self_attn.q_proj.weight"), r"no tensor model\.layers\.0\.self_attn\.q_proj"),
    "gate": (_without("layers.1.mlp.gate_proj.weight"), r"no tensor .*gate_proj"),
    "k_norm": (_without("layers.1.self_attn.k_norm.weight"), r"no tensor .*k_norm"),
    "embedding": (_without(_EMBEDDING), r"no tensor model\.embed_tokens"),
    "head": (_without("lm_head.weight"), r"no tensor lm_head"),
    "last layer": (lambda t: {n: v for n, v in t.items() if ".layers.1." not in n}, r"no tensor model\.layers\.1\."),
    "another layer": (
        lambda t: {**t, "model.layers.2.x": torch.ones(3)},
        r"a tensor model\.layers\.2\.x in model\.saf",
    ),
    "columns": (
        _changed(_DOWN, lambda t: t[:, :-1]),
        r"down_proj\.weight of the shape \[32, 47\] instead of \[32, 48\]",
    ),
    "transposed": (_changed(_DOWN, lambda t: t.t()), r"down_proj\.weight of the shape \[48, 32\]"),
    "short vocabulary": (
        _changed(_EMBEDDING, lambda t: t[:201]),
        r"model\.embed_tokens\.weight with 201 vocabulary entries",
    ),
    "long vocabulary": (
        _changed(_EMBEDDING, lambda t: torch.cat([t, t])),
        r"406 vocabulary entries and vocab_size=203",
    ),
    "int8": (lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}, r"lm_head\.weight of type I8"),
    "one int8": (_changed(_DOWN, lambda t: t.to(torch.int8)), r"down_proj\.weight of type I8"),
    "fp8": (_changed(_DOWN, lambda t: t.to(torch.float8_e4m3fn)), r"down_proj\.weight of type F8_E4M3"),
    "fp64": (_changed(_DOWN, lambda t: t.double()), r"down_proj\.weight of type F64"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_are_not_those_of_the_architecture_are_refused(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    change, message = DAMAGE[name]
    folder = _copy(models["qwen3"], tmp_path / "model")
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(UserError, match=message) as refused:
        open_source(str(folder))
    assert "\n" not in str(refused.value)


def test_rotary_frequencies_and_half_precision_are_accepted(models: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(models["qwen3"], tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6, dtype=torch.float64)}
    save_file({name: tensor.half() for name, tensor in tensors.items()} | unused, folder / WEIGHTS)
    assert HuggingFaceModel(folder).tensor_names == sorted(tensors)


def test_an_output_matrix_that_contradicts_the_configuration_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = _copy(models["qwen3_tied"], tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors[_EMBEDDING].clone()}, folder / WEIGHTS)
    assert "lm_head.weight" in HuggingFaceModel(folder).tensor_names
    save_file({**tensors, "lm_head.weight": tensors[_EMBEDDING] + 1}, folder / WEIGHTS)
    with pytest.raises(UserError, match="tie_word_embeddings=true and a lm_head"):
        HuggingFaceModel(folder)


def _shards(folder: Path, pattern: str = "model-{:05d}-of-00002.safetensors") -> dict[str, str]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for position, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: tensors[name] for name in part}, folder / pattern.format(position))
        index.update(dict.fromkeys(part, pattern.format(position)))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def _index(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Two shards whose index is replaced by the result of `change`, which is text or is written as JSON."""

    def make(folder: Path) -> None:
        content = change(folder, _shards(folder))
        if content is not None:
            (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def _weight_map(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return _index(lambda folder, index: {"weight_map": change(dict(index))})


def _beside(name: str, tensors: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors(load_file(folder / WEIGHTS)), folder / name)


def _stale(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    _shards(folder)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, folder / WEIGHTS)


def _link(target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(target)

    return make


def _pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import os

        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3359472\n"
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "older single file": (_stale, r"both in model-00001-of-00002\.safetensors and in model\.safetensors"),
    "duplicate": (_beside("zz_old.safetensors", lambda t: t), r"both in model\.safetensors and in zz_old\.safetensors"),
    "vendor's copy": (_beside("consolidated.safetensors", lambda t: {"output.weight": torch.ones(3)}), "consolidated"),
    "adapter": (_beside("adapter_model.safetensors", lambda t: {"base.lora_A": torch.ones(3)}), "adapter_model"),
    "adapter's configuration": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json beside"),
    "pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), r"model\.safetensors, which is a git-lfs pointer"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors, which is empty"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), r"model\.safetensors, which cannot"),
    "cut header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]), "which cannot be read"),
    "device": (_link("/dev/zero"), r"model\.safetensors, which is a device"),
    "link to nothing": (_link("nowhere"), r"model\.safetensors, which is a dangling link"),
    "directory": (_link("."), r"model\.safetensors, which is a directory"),
    "pipe": (_pipe(WEIGHTS), r"model\.safetensors, which is a pipe"),
    "pipe as configuration": (_pipe("config.json"), r"config\.json, which is a pipe"),
    "pipe as index": (_pipe(INDEX), r"index\.json, which is a pipe"),
    "pipe as template": (_pipe("chat_template.jinja"), r"chat_template\.jinja, which is a pipe"),
    "missing shard": (_index(lambda f, i: (f / i[_DOWN]).unlink()), r"index\.json, which names model-0000"),
    "shard without index": (_index(lambda f, i: [(f / n).unlink() for n in (INDEX, i[_DOWN])] and None), "no tensor"),
    "no JSON": (_index(lambda f, i: "{"), "index.json: Expecting"),
    "empty index": (_index(lambda f, i: ""), "index.json, which is empty"),
    "pointer as index": (_index(lambda f, i: POINTER), "index.json, which is a git-lfs pointer"),
    "no map": (_index(lambda f, i: {}), "no weight_map"),
    "list": (_index(lambda f, i: []), "a JSON list"),
    "numbers": (_weight_map(lambda i: {**i, _DOWN: 7}), "no weight_map of names and files"),
    "outside": (_weight_map(lambda i: {**i, _DOWN: "../x.safetensors"}), "which is outside the directory"),
    "no weights": (_weight_map(lambda i: {**i, _DOWN: "config.json"}), r"config\.json, which is not a \*\.safetensors"),
    "other file": (
        _weight_map(lambda i: {**i, _DOWN: i["lm_head.weight"], "lm_head.weight": i[_DOWN]}),
        "no such tens",
    ),
    "name left out": (
        _weight_map(lambda i: {n: f for n, f in i.items() if n != _DOWN}),
        "does not name model.layers.1.mlp",
    ),
    "too many names": (_weight_map(lambda i: {**i, "x": i[_DOWN]}), "lists x in model-"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_damaged_or_contradict_each_other_are_refused(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    change, message = FILES[name]
    folder = _copy(models["qwen3"], tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=message) as refused:
        open_source(str(folder))
    assert "\n" not in str(refused.value)


def test_common_layouts_of_files_are_read(models: dict[str, Path], tmp_path: Path) -> None:
    """Shards of any name; shards without an index; a vendor's copy next to an index; a snapshot of the hub's cache."""
    source = models["qwen3"]
    folders = {name: _copy(source, tmp_path / name) for name in ("odd", "bare", "vendor")}
    _shards(folders["odd"], "model.safetensors-{:05d}-of-00002.safetensors")
    _shards(folders["bare"])
    (folders["bare"] / INDEX).unlink()
    _shards(folders["vendor"])
    save_file({"output.weight": torch.ones(3, dtype=torch.int8)}, folders["vendor"] / "consolidated.safetensors")
    blobs, folders["cache"] = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    folders["cache"].mkdir(parents=True)
    for file in source.iterdir():
        shutil.copy(file, blobs / f"sha-{file.name}")
        (folders["cache"] / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    expected = load_file(source / WEIGHTS)
    for folder in folders.values():
        tensors = HuggingFaceModel(folder).tensors()
        assert {name: tensors[name].sum() for name in tensors} == {name: t.sum() for name, t in expected.items()}
        assert huggingface_digest(folder) == huggingface_digest(source)


def test_only_files_of_the_model_are_copied_into_an_export(models: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(models["qwen3"], tmp_path / "model")
    for name in ("trainer_state.json", "notes.txt", "modeling_x.py", "recipe.json"):
        (folder / name).write_text("{}")
    (tmp_path / "out").mkdir()
    HuggingFaceModel(folder).copy_artifacts(tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}


def _copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def _seal(checkpoint: Path) -> None:
    """Writes a manifest that agrees with the files, as if the checkpoint had been written like this."""
    facts = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("format", "files")}
    write_manifest(checkpoint, facts, file_digests(checkpoint, list_files(checkpoint)))


def _incomplete(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, list[str]]:
    """The messages of conversion and training for checkpoints in which one tensor is missing, smaller, or int8."""
    pieces = list(HuggingFaceModel(source).tensor_map().pieces(HuggingFaceModel(source).tensors(), torch.float32))
    huggingface_to_nemo(HuggingFaceModel(source), folder / "whole", "fp32")
    changed_key = "decoder.layers.mlp.linear_fc2.weight"

    def smaller(piece: Piece) -> Piece:
        if piece.key != changed_key:
            return piece
        *outer, last = piece.shape
        return Piece(piece.key, piece.position, (*outer, last - 1), piece.dtype, lambda: piece.make()[:, :-1])

    def as_int8(piece: Piece) -> Piece:
        return (
            Piece(piece.key, piece.position, piece.shape, torch.int8, piece.make) if piece.key == changed_key else piece
        )

    variants = {
        "missing": [piece for piece in pieces if piece.key != changed_key],
        "smaller": [smaller(piece) for piece in pieces],
        "int8": [as_int8(piece) for piece in pieces],
    }
    messages = {}
    for name, changed_pieces in variants.items():
        checkpoint = Path(shutil.copytree(folder / "whole", folder / name))
        shutil.rmtree(checkpoint / "weights")
        (checkpoint / "weights").mkdir()
        write_distributed_tensors(checkpoint / "weights", changed_pieces)
        _seal(checkpoint)
        messages[name] = []
        for attempt in (
            lambda checkpoint=checkpoint: to_huggingface(open_source(str(checkpoint)), folder / "out", "fp32"),
            lambda checkpoint=checkpoint: open_source(str(checkpoint)).load(build_student(source).chunks),
        ):
            try:
                attempt()
                messages[name].append("")
            except UserError as error:
                messages[name].append(str(error))
    return messages


def test_an_incomplete_checkpoint_is_refused_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path
) -> None:
    [messages] = run_ranks(_incomplete, 1, models["qwen3"], tmp_path)
    assert "no tensor decoder.layers.mlp.linear_fc2.weight" in messages["missing"][0]
    assert "linear_fc2" in messages["missing"][1]
    assert "[2, 32, 47]" in messages["smaller"][0]
    assert "linear_fc2" in messages["smaller"][1]
    assert "linear_fc2.weight of type torch.int8" in messages["int8"][0]
    assert not list(tmp_path.glob("out*"))
