"""NeMo checkpoints: saved in one layout and restored in another, packed, merged, damaged, replaced."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import file_digests, list_files, read_manifest, write_manifest
from nemo_popsd.checkpoint.nemo import NemoCheckpoint, is_nemo_checkpoint
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
from nemo_popsd.parallel.config import ParallelConfig
from tests.harness import run_ranks
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (2, 9), generator=torch.Generator().manual_seed(3))
LORA = LoRAConfig(rank=4, alpha=6.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"adaptation": "full"},
    "lora": {"adaptation": "lora", "lora": LORA},
    "full_bf16": {"adaptation": "full", "precision": "bf16"},
}


def _config(name: str) -> Any:
    return to_dict_config(PopsdConfig(student=StudentConfig(**{"precision": "fp32", **SETTINGS[name]})))


def _content(student: Any, architecture: Any, name: str, step: int) -> Content:
    return Content(models=student.chunks, architecture=architecture, config=_config(name), step=step)


def _perturb(gpt: Any, rank: int) -> None:
    """Adds noise to the trained weights: equal on every rank if replicated, 0 in the padding of the vocabulary."""
    shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8 + rank)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.requires_grad:
                sharded = getattr(p, "tensor_model_parallel", False)
                noise = torch.randn(p.shape, generator=own if sharded else shared)
                p.add_((0.1 * noise * (p != 0 if "embedding" in name or "output" in name else 1)).to(p.dtype))


def _restore(path: Path, world_size: int, name: str) -> tuple[NemoCheckpoint, Any]:
    """The student as `restore_from` builds it."""
    from nemo_popsd.megatron.student import Student

    def refuse(_: Any) -> None:
        raise AssertionError("the source must not be read")

    checkpoint = NemoCheckpoint(path)
    student = Student(
        checkpoint.architecture,
        checkpoint.config.student,
        ParallelConfig(tensor=world_size, sequence="false"),
        seed=99,
        load_initial=refuse,
        load_trained=checkpoint.load_trained,
    )
    return checkpoint, student


def _merged(path: Path, world_size: int) -> Any:
    """A model without adapters, loaded as `student.source` is."""
    from nemo_popsd.megatron.build import build_chunks

    source = open_source(str(path))
    [model] = build_chunks(
        source.architecture.provider(),
        StudentConfig(precision="fp32"),
        ParallelConfig(tensor=world_size, sequence="false"),
    )
    source.load(model)
    return model


def _children() -> list[str]:
    return [process.name() for process in psutil.Process().children(recursive=True)]


def _save(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        student = build_student(source, tensor=world_size, **settings)
        _perturb(student.gpt, rank)
        for suffix in ("", ".nemo"):
            save_nemo(folder / f"{name}{suffix}", _content(student, HuggingFaceModel(source), name, 17))
        HuggingFaceModel(source).export(student.gpt, folder / f"{name}_hf")
        result[name] = whole_logits(student.gpt, IDS, 203)
    result["children"] = _children()
    return result


def _load(rank: int, world_size: int, folder: Path, again: Path) -> dict[str, Any]:
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(tensor=world_size), seed=1)
    result: dict[str, Any] = {}
    for name in SETTINGS:
        for suffix in ("", ".nemo"):
            checkpoint, student = _restore(folder / f"{name}{suffix}", world_size, name)
            result[name + suffix] = whole_logits(student.gpt, IDS, 203)
            assert checkpoint.step == 17
            assert checkpoint.config == PopsdConfig(student=checkpoint.config.student)
        result[f"{name} merged"] = whole_logits(_merged(folder / name, world_size), IDS, 203)
        save_nemo(again / name, _content(student, checkpoint.architecture, name, 18))
        checkpoint.architecture.export(student.gpt, again / f"{name}_hf")
    result["children"] = _children()
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, 1), id="tp2-to-tp1"),
        pytest.param((1, 2), id="tp1-to-tp2", marks=pytest.mark.slow),
    ],
)
def moved(request, source, tmp_path_factory):
    saved, loaded = request.param
    folder, again = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("again")
    return folder, again, run_ranks(_save, saved, source, folder), run_ranks(_load, loaded, folder, again)


def _tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("suffix", ["", ".nemo"])
def test_a_checkpoint_restores_the_student_in_another_layout(moved, name, suffix):
    _, _, before, after = moved
    for result in after:
        tolerance = 1e-5 if "bf16" not in name else 0.1
        torch.testing.assert_close(result[name + suffix], before[0][name], rtol=0, atol=tolerance)
    assert (before[0]["full"] - before[0]["lora"]).abs().max() > 0.1


@pytest.mark.parametrize("name", SETTINGS)
def test_exports_before_and_after_a_restore_are_bit_equal(moved, name):
    """Under LoRA each layout computes the merge, so the exports are equal up to rounding."""
    folder, again, _, _ = moved
    before, after = _tensors(folder / f"{name}_hf"), _tensors(again / f"{name}_hf")
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6 if name == "lora" else 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_as_a_source_is_the_student_with_merged_adapters(moved, name):
    folder, _, before, after = moved
    for result in after:
        tolerance = 2e-5 if "bf16" not in name else 0.1
        torch.testing.assert_close(result[f"{name} merged"], before[0][name].float(), rtol=0, atol=tolerance)
    with torch.no_grad():
        exported = load_dense(folder / f"{name}_hf")(IDS).logits
    torch.testing.assert_close(exported, before[0][name].float(), rtol=0, atol=tolerance)


def test_a_save_leaves_no_process_and_no_partial_file(moved):
    folder, again, before, after = moved
    assert [result["children"] for result in (*before, *after)] == [[]] * 3
    names = {file.name for directory in (folder, again) for file in directory.iterdir()}
    assert names == {*SETTINGS, *(f"{n}.nemo" for n in SETTINGS), *(f"{n}_hf" for n in SETTINGS)}


def test_a_checkpoint_has_its_files_and_manifest(moved, source):
    folder, _, before, _ = moved
    assert {path.name for path in (folder / "lora").iterdir()} == {
        ".nemo_popsd",
        "model_config.yaml",
        "manifest.json",
        "huggingface",
        "weights",
    }
    manifest = json.loads((folder / "lora" / "manifest.json").read_text())
    assert manifest["step"] == 17
    sizes = {"tensor": len(before), "pipeline": 1, "context": 1, "expert": 1, "data": 1}
    assert manifest["layout"] == sizes
    assert manifest["weights"] == "whole"
    assert "weights/.metadata" in manifest["files"]
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in manifest["versions"]["torch"]
    with tarfile.open(folder / "lora.nemo") as archive:
        assert {"./manifest.json", "./model_config.yaml"} <= set(archive.getnames())
    assert (folder / "lora" / "huggingface" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert HuggingFaceModel(folder / "lora" / "huggingface").tensor_names == HuggingFaceModel(source).tensor_names


def test_checkpoints_and_directories_are_distinguished(moved, source):
    folder = moved[0]
    assert is_nemo_checkpoint(folder / "full")
    assert is_nemo_checkpoint(folder / "full.nemo")
    assert not is_nemo_checkpoint(source)
    assert open_source(str(source)).architecture.vocab_size == 203
    assert open_source("nemo_popsd:tiny_reasoner").architecture.vocab_size > 0
    with pytest.raises(UserError, match="no such directory"):
        open_source(str(folder / "nowhere"))


@pytest.mark.parametrize("missing", ["manifest.json", "model_config.yaml", "weights", "huggingface"])
def test_an_incomplete_checkpoint_is_refused(moved, tmp_path, missing):
    copied = Path(shutil.copytree(moved[0] / "full", tmp_path / "copied"))
    (copied / missing).rename(tmp_path / missing)
    with pytest.raises(UserError, match=f"(no {missing}|{missing}.* is missing).*need an unchanged NeMo checkpoint"):
        NemoCheckpoint(copied)


@pytest.mark.parametrize("name", ["huggingface/merges.txt", "huggingface/config.json", "weights"])
def test_a_link_out_of_a_checkpoint_is_refused(moved, tmp_path, name):
    copied = Path(shutil.copytree(moved[0] / "full", tmp_path / "copied"))
    if (copied / name).exists():
        (copied / name).rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("a secret")
    (copied / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=rf"'{name}', a symbolic link out of the directory"):
        NemoCheckpoint(copied)
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(UserError, match=rf"'{name}', which is neither a file nor a directory"):
        NemoCheckpoint(copied)


def test_a_checkpoint_behind_a_link_or_in_the_cache_of_the_hub_is_read(moved, tmp_path):
    (tmp_path / "newest").symlink_to(moved[0] / "full")
    assert NemoCheckpoint(tmp_path / "newest").step == 17
    snapshot = Path(shutil.copytree(moved[0] / "full", tmp_path / "models--a--b" / "snapshots" / "0"))
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "huggingface" / "config.json").rename(tmp_path / "models--a--b" / "blobs" / "0123")
    (snapshot / "huggingface" / "config.json").symlink_to("../../../blobs/0123")
    assert NemoCheckpoint(snapshot).step == 17


def test_a_configuration_with_exponential_aliases_is_refused(moved, tmp_path):
    copied = Path(shutil.copytree(moved[0] / "full", tmp_path / "copied"))
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    (copied / "model_config.yaml").write_text("\n".join(lines))
    _seal(copied)
    with pytest.raises(UserError, match=r"model_config\.yaml .*aliases that expand to more than"):
        NemoCheckpoint(copied)


def test_files_that_are_not_checkpoints_are_refused(moved, tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        NemoCheckpoint(tmp_path / "nowhere.nemo")
    (tmp_path / "garbage.nemo").write_bytes(b"garbage" * 200)
    with pytest.raises(UserError, match="an incomplete or damaged tar archive"):
        NemoCheckpoint(tmp_path / "garbage.nemo")
    content = (moved[0] / "full.nemo").read_bytes()
    (tmp_path / "cut.nemo").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        NemoCheckpoint(tmp_path / "cut.nemo")
    (tmp_path / "empty.nemo").write_bytes(b"")
    with pytest.raises(UserError):
        NemoCheckpoint(tmp_path / "empty.nemo")
    copied = tmp_path / "copied"
    shutil.copytree(moved[0] / "full", copied)
    (copied / "model_config.yaml").write_text("optimizer: {nonsense: 1}\n")
    with pytest.raises(UserError, match=r"model_config\.yaml has 25 bytes instead of"):
        NemoCheckpoint(copied)
    _seal(copied)
    with pytest.raises(UserError, match="nonsense"):
        NemoCheckpoint(copied)
    (copied / "model_config.yaml").write_text("a: [")
    _seal(copied)
    with pytest.raises(UserError, match=r"unreadable model_config\.yaml"):
        NemoCheckpoint(copied)
    for content in ("{", "[]", "{}"):
        (copied / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"unreadable manifest\.json"):
            NemoCheckpoint(copied)


def test_required_files_are_checked_even_if_the_manifest_does_not_list_them(moved, tmp_path):
    for name in ("huggingface/config.json", "huggingface/tensor_names.json", "weights/common.pt", "model_config.yaml"):
        copied = tmp_path / name.replace("/", "-")
        shutil.copytree(moved[0] / "full", copied)
        (copied / name).unlink()
        with pytest.raises(UserError, match=f"got {name} is missing"):
            NemoCheckpoint(copied)
        _seal(copied)
        with pytest.raises(UserError, match=rf"got no {name} in manifest\.json"):
            NemoCheckpoint(copied)


def _load_broken(rank: int, world_size: int, broken: list[Path]) -> list[str]:
    messages = []
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(), seed=1)
    for path in broken:
        try:
            checkpoint = NemoCheckpoint(path)
            [model] = build_chunks(checkpoint.architecture.provider(), checkpoint.config.student, ParallelConfig())
            checkpoint.load_trained(model)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_damaged_weights_and_weights_of_another_model_are_refused(moved, tmp_path):
    folder = moved[0]
    cases = ("empty", "other", "without data", "cut data", "cut index")
    for case in cases:
        copied = tmp_path / case
        shutil.copytree(folder / "full", copied)
        shutil.rmtree(copied / "weights")
        if case == "empty":
            (copied / "weights").mkdir()
            continue
        shutil.copytree(folder / ("lora" if case == "other" else "full") / "weights", copied / "weights")
        for file in (copied / "weights").iterdir():
            if {"cut data": ".distcp", "cut index": ".metadata"}.get(case, "none") in file.name:
                file.write_bytes(file.read_bytes()[:100])
            if case == "without data" and file.suffix == ".distcp":
                file.unlink()
        if case == "other":
            _seal(copied)
    [messages] = run_ranks(_load_broken, 1, [tmp_path / case for case in cases])
    by_case = dict(zip(cases, messages, strict=True))
    assert "weights/.metadata is missing" in by_case["empty"]
    assert "unexpected tensors" in by_case["other"]
    assert "adapter" in by_case["other"]
    assert "distcp is missing" in by_case["without data"]
    assert "distcp has 100 bytes instead of" in by_case["cut data"]
    assert ".metadata has 100 bytes instead of" in by_case["cut index"]


def _seal(directory: Path) -> None:
    """Writes a manifest that agrees with the files."""
    facts = {k: v for k, v in read_manifest(directory).items() if k not in ("files", "format")}
    write_manifest(directory, facts, file_digests(directory, list_files(directory)))


def _save_twice(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    """Saves three times, and the second save fails; for a directory and a packed file."""
    import nemo_popsd.checkpoint.save as save

    student = build_student(source, tensor=world_size)
    architecture, result = HuggingFaceModel(source), {}
    for path in (folder / "run", folder / "run.nemo"):
        save_nemo(path, _content(student, architecture, "full", 1))
        write = save.write_manifest

        def fail(*_: Any) -> None:
            raise OSError(28, "no space left")

        save.write_manifest = fail
        try:
            with pytest.raises(UserError, match=r"got no space left \(rank 0\).*free space"):
                save_nemo(path, _content(student, architecture, "full", 2))
        finally:
            save.write_manifest = write
        result[path.name] = NemoCheckpoint(path).step
        save_nemo(path, _content(student, architecture, "full", 3))
        result[f"{path.name} replaced"] = NemoCheckpoint(path).step
    return result


def test_a_failed_save_leaves_the_previous_checkpoint_and_the_next_save_replaces_it(source, tmp_path):
    [result] = run_ranks(_save_twice, 1, source, tmp_path)
    assert result == {"run": 1, "run replaced": 3, "run.nemo": 1, "run.nemo replaced": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.nemo"}
