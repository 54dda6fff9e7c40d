"""Hugging Face to Megatron and back: logits agree with transformers, tensors are bit-equal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import EXPORT, MARK
from tests.harness import run_ranks
from tests.tiny_models import KINDS, assert_same_configuration, build_student, load_dense, save_tiny_model, whole_logits

SHARD_BYTES = 9_000
IDS = torch.randint(0, 203, (2, 13), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(folder / kind, kind, seed=seed) for seed, kind in enumerate(KINDS)}


def _convert(rank: int, world_size: int, sources: dict[str, Path], output: Path) -> dict[str, dict]:
    results = {}
    for kind, directory in sources.items():
        student = build_student(directory, tensor=world_size)
        architecture = HuggingFaceModel(directory)
        architecture.export(student.gpt, output / kind)
        architecture.export(student.gpt, output / f"{kind}_shards", shard_bytes=SHARD_BYTES)
        results[kind] = {
            "logits": whole_logits(student.gpt.eval(), IDS, student.vocab_size),
            "padded": student.gpt.vocab_size,
            "padding": student.weight.detach()[max(0, 203 - rank * student.weight.shape[0]) :].abs().sum(),
        }
    return results


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def converted(request, sources, tmp_path_factory, layers):
    output = tmp_path_factory.mktemp(f"exports{request.param}")
    return request.param, output, run_ranks(_convert, request.param, sources, output, timeout=300.0, layers=layers)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(converted, sources, kind):
    size, _, results = converted
    with torch.no_grad():
        expected = load_dense(sources[kind])(IDS).logits
    for result in results:
        assert result[kind]["padded"] == 256 * ((203 + 128 * size - 1) // 256 if size == 2 else 1)
        assert result[kind]["padding"] == 0
        torch.testing.assert_close(result[kind]["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_bit_equal_to_the_source_and_has_its_files(converted, sources, kind):
    _, output, _ = converted
    before, after = load_file(sources[kind] / "model.safetensors"), load_file(output / kind / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert_same_configuration(output / kind, sources[kind])
    for file in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / kind / file).read_bytes() == (sources[kind] / file).read_bytes()
    assert {path.name for path in (output / kind).iterdir()} == {path.name for path in sources[kind].iterdir()} | {MARK}
    with torch.no_grad():
        torch.testing.assert_close(
            load_dense(output / kind)(IDS).logits, load_dense(sources[kind])(IDS).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_shards_has_an_index_and_loads_in_transformers(converted, sources, kind):
    _, output, _ = converted
    directory = output / f"{kind}_shards"
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 3
    content = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(content["weight_map"].values()) == {file.name for file in files}
    shards = {file.name: load_file(file) for file in files}
    assert {name: file for file, tensors in shards.items() for name in tensors} == content["weight_map"]
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in shards.values()]
    assert content["metadata"]["total_size"] == sum(sizes)
    assert all(size <= SHARD_BYTES or len(t) == 1 for size, t in zip(sizes, shards.values(), strict=True))
    assert all(file.stat().st_mode & 0o044 for file in files), "readable by others"
    with torch.no_grad():
        torch.testing.assert_close(
            load_dense(directory)(IDS).logits, load_dense(sources[kind])(IDS).logits, rtol=0, atol=0
        )
    assert HuggingFaceModel(directory).tensor_names == HuggingFaceModel(sources[kind]).tensor_names


def test_an_export_leaves_no_temporary_files(converted):
    _, output, _ = converted
    assert {path.name for path in output.iterdir()} == {*KINDS, *(f"{kind}_shards" for kind in KINDS)}


def _load_messages(rank: int, world_size: int, directories: list[Path]) -> list[str]:
    messages = []
    for directory in directories:
        try:
            build_student(directory, tensor=world_size)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_missing_unexpected_and_resized_tensors_are_errors_on_every_rank(sources, tmp_path):
    tensors = load_file(sources["qwen3"] / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    extra = "model.layers.2.mlp.up_proj.weight"
    variants = {
        "nothing": tensors,
        extra: {**tensors, extra: torch.ones(3)},
        f"{embedding} with 201 vocabulary entries": {**tensors, embedding: tensors[embedding][:201].clone()},
        f"{embedding} with 300 vocabulary entries": {**tensors, embedding: torch.ones(300, 32)},
    }
    for missing in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        variants[f"no tensor {missing}"] = {name: value for name, value in tensors.items() if name != missing}
    folders = []
    for index, content in enumerate(variants.values()):
        folders.append(tmp_path / str(index))
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_bytes((sources["qwen3"] / "config.json").read_bytes())
        save_file(content, folders[-1] / "model.safetensors")
    for messages in run_ranks(_load_messages, 2, folders):
        assert messages[0] == ""
        for name, message in zip([*variants][1:], messages[1:], strict=True):
            assert name in message
            assert "set student.source" in message


def test_a_tied_model_may_contain_its_output_matrix_and_rotary_frequencies(sources, tmp_path):
    (tmp_path / "config.json").write_bytes((sources["qwen3_tied"] / "config.json").read_bytes())
    tensors = load_file(sources["qwen3_tied"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        6
    )  # old checkpoints contain them; they are ignored
    save_file(tensors, tmp_path / "model.safetensors")
    run_ranks(_export, 1, tmp_path, tmp_path / "out")
    with torch.no_grad():
        before, after = (load_dense(folder)(IDS).logits for folder in (sources["qwen3_tied"], tmp_path / "out"))
    assert torch.equal(before, after)


def test_a_directory_without_a_supported_model_is_refused(tmp_path, sources):
    with pytest.raises(UserError, match=r"no such directory.*set student.source"):
        HuggingFaceModel(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        HuggingFaceModel(tmp_path)
    (tmp_path / "config.json").write_bytes((sources["qwen3"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        HuggingFaceModel(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*Qwen3ForCausalLM"):
        HuggingFaceModel(tmp_path)


_KILLED_EXPORT = """
import os, signal, sys
import nemo_popsd.checkpoint.huggingface as hf
import nemo_popsd.checkpoint.safetensors_files as files
from tests.tiny_models import build_student

source, output = sys.argv[1:]
student = build_student(source)
save, written = files.save_file, []

def save_and_die(*args, **kwargs):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(save(*args, **kwargs))

files.save_file = save_and_die
hf.HuggingFaceModel(source).export(student.gpt, output, shard_bytes=9_000)
"""


@pytest.mark.slow
def test_a_kill_during_an_export_leaves_the_previous_export_intact(sources, tmp_path):
    output = tmp_path / "export"
    with new_directory(output, EXPORT) as partial:
        (partial / "model.safetensors").write_bytes(b"previous export")
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _KILLED_EXPORT, str(sources["qwen3"]), str(output)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in output.iterdir()) == [".nemo_popsd", "model.safetensors"]
    assert (output / "model.safetensors").read_bytes() == b"previous export"
    assert (tmp_path / "export.partial").is_dir()
    # The next export removes the partial directory, and replaces the previous export.
    run_ranks(_export, 1, sources["qwen3"], output)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert HuggingFaceModel(output).tensor_names == HuggingFaceModel(sources["qwen3"]).tensor_names


def _export(rank: int, world_size: int, source: Path, output: Path) -> None:
    HuggingFaceModel(source).export(build_student(source, tensor=world_size).gpt, output)


def test_artifacts_are_written_after_the_source_directory_was_removed(sources, tmp_path):
    """A run may outlive the directory from which it started."""
    source = tmp_path / "source"
    shutil.copytree(sources["qwen3"], source)
    (source / "tokenizer.json").write_text("{}")
    (source / "vocab.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model = HuggingFaceModel(source)
    shutil.rmtree(source)
    for name in ("all", "tokenizer"):
        (tmp_path / name).mkdir()
    model.copy_artifacts(tmp_path / "all", with_tensor_names=True)
    model.copy_tokenizer(tmp_path / "tokenizer")
    assert_same_configuration(tmp_path / "all", sources["qwen3"])
    assert {"tokenizer.json", "chat_template.jinja", "tensor_names.json"} <= {
        f.name for f in (tmp_path / "all").iterdir()
    }
    assert sorted(file.name for file in (tmp_path / "tokenizer").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
