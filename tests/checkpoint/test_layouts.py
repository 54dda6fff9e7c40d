"""Checkpoints and exports of parallel layouts: a checkpoint of any layout is read in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.megatron.config import LoRAConfig
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model
from tests.training.layouts import randomize_adapters

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline": 2},
    "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp2 uneven": {"pipeline": 2, "last_stage_layers": 1},
    "tp2 sp": {"tensor": 2, "sequence": "true"},
    "cp2": {"context": 2},
}
CASES = {"full": "qwen3", "tied": "qwen3_tied", "lora": "qwen3"}
MIXTURE = {"full": "qwen3_moe", "lora": "qwen3_moe"}


def _lora(kind: str) -> LoRAConfig:
    attention = {"targets": ["linear_qkv", "linear_proj"]} if kind == "qwen3_moe" else {}
    return LoRAConfig(rank=4, alpha=6.0, **attention)


def _student(source: Path, case: str, parallel: dict[str, Any]) -> Any:
    lora = {"adaptation": "lora", "lora": _lora(source.name)} if case == "lora" else {}
    return build_student(source, parallel=parallel, **lora)


def _write(rank: int, world_size: int, folder: Path, parallel: dict[str, Any], cases: dict[str, str] = CASES) -> None:
    """Writes a checkpoint and an export of each case; adapters are not 0."""
    for case, kind in cases.items():
        student = _student(folder / kind, case, parallel)
        if case == "lora":
            randomize_adapters(student)
        config = PopsdConfig()
        config.student.precision = "fp32"
        config.student.adaptation = "lora" if case == "lora" else "full"
        config.student.lora = _lora(kind)
        architecture = HuggingFaceModel(folder / kind)
        tree = to_dict_config(config)
        assert OmegaConf.is_dict(tree)
        save_nemo(
            folder / "out" / f"{case}.nemo_dir",
            Content(models=student.chunks, architecture=architecture, config=tree, step=1),
        )
        architecture.export(student.chunks, folder / "out" / f"{case}_hf")


def _read(
    rank: int, world_size: int, folder: Path, parallel: dict[str, Any], out: str, cases: dict[str, str] = CASES
) -> None:
    """Exports the checkpoint of each case from this layout, as the trained model and as the source of a run."""
    for case, kind in cases.items():
        checkpoint = NemoCheckpoint(folder / "out" / f"{case}.nemo_dir")
        student = _student(folder / kind, case, parallel)
        checkpoint.load_trained(student.chunks)
        checkpoint.architecture.export(student.chunks, folder / out / f"{case}_hf")
        plain = _student(folder / kind, "full", parallel)
        checkpoint.load(plain.chunks, load_base=checkpoint.load_trained)
        checkpoint.architecture.export(plain.chunks, folder / out / f"{case}_merged_hf")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_and_the_layout_export_equal_weights_from_a_checkpoint_of_the_layout(
    tmp_path: Path, layout: str, layers: str
) -> None:
    """Local and TE layers. The single process has local layers, because checkpoints do not depend on the layers."""
    for kind in ("qwen3", "qwen3_tied"):
        save_tiny_model(tmp_path / kind, kind, num_hidden_layers=4)
    run_ranks(_write, 2, tmp_path, LAYOUTS[layout], layers=layers)
    run_ranks(_read, 1, tmp_path, {}, "one process")
    run_ranks(_read, 2, tmp_path, LAYOUTS[layout], "two processes", layers=layers)
    _compare(tmp_path, CASES, ("one process", "two processes"))


@pytest.mark.slow
def test_one_process_reads_a_checkpoint_of_experts_that_ranks_have_parts_of(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "qwen3_moe", "qwen3_moe")
    parallel = {"tensor": 2, "sequence": "true", "expert": 2, "expert_tensor": 2}
    run_ranks(_write, 4, tmp_path, parallel, MIXTURE)
    run_ranks(_read, 1, tmp_path, {}, "one process", MIXTURE)
    _compare(tmp_path, MIXTURE, ("one process",))


def _compare(tmp_path: Path, cases: dict[str, str], outs: tuple[str, ...]) -> None:
    for case, kind in cases.items():
        expected = load_file(tmp_path / "out" / f"{case}_hf" / "model.safetensors")
        source = load_file(tmp_path / kind / "model.safetensors")
        assert expected.keys() == source.keys()
        changed = {name for name, value in source.items() if not torch.equal(value, expected[name])}
        assert bool(changed) == (case == "lora")
        for out in outs:
            for suffix in ("", "_merged"):
                actual = load_file(tmp_path / out / f"{case}{suffix}_hf" / "model.safetensors")
                for name, value in expected.items():
                    torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6, msg=f"{case} {out} {name}")
