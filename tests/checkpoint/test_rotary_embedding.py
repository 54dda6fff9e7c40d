"""Both forms of the rotary embedding in ``config.json``, of transformers 4 and 5, produce the same model and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from tests.harness import run_ranks
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (2, 40), generator=torch.Generator().manual_seed(3))


def _rewritten(source: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(content)))
    return folder


def _to_4(content: dict[str, Any]) -> dict[str, Any]:
    if parameters := content.pop("rope_parameters", None):
        content |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    return content


def _to_5(content: dict[str, Any]) -> dict[str, Any]:
    content = _to_4(content)
    theta, scaling = content.pop("rope_theta"), content.pop("rope_scaling", None) or {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": theta}
    if content["model_type"] == "olmo3":
        plain = {"rope_type": "default", "rope_theta": theta}
        parameters = {"full_attention": parameters, "sliding_attention": plain}
    return {**content, "rope_parameters": parameters, "transformers_version": "5.0.0"}


def _logits(rank: int, world_size: int, directories: list[Path], exports: Path) -> list[torch.Tensor]:
    results = []
    for directory in directories:
        student = build_student(directory)
        results.append(whole_logits(student.gpt.eval(), IDS, student.vocab_size))
        HuggingFaceModel(directory).export(student.gpt, exports / directory.name)
    return results


@pytest.mark.slow
def test_both_forms_of_the_rotary_embedding_give_bit_equal_logits_that_agree_with_transformers(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "qwen3": {"rope_theta": 50000.0},
        "llama3": {},
        "olmo3": {"rope_theta": 20000.0},
        "smollm3": {},
        "mistral": {},
    }
    saved = [
        save_tiny_model(tmp_path / f"{kind}-saved", kind, seed=seed, **fields)
        for seed, (kind, fields) in enumerate(kinds.items())
    ]
    older = [_rewritten(folder, tmp_path / kind, _to_4) for folder, kind in zip(saved, kinds, strict=True)]
    newer = [_rewritten(folder, tmp_path / f"{folder.name}-5", _to_5) for folder in older]
    [results] = run_ranks(_logits, 1, [*older, *newer], tmp_path / "exports", timeout=300.0)
    for index, folder in enumerate(older):
        with torch.no_grad():
            expected = load_dense(folder)(IDS).logits
            exported = load_dense(tmp_path / "exports" / newer[index].name)(IDS).logits
        torch.testing.assert_close(results[index], expected, rtol=0, atol=1e-5)
        assert torch.equal(results[index], results[index + len(older)]), folder.name
        # Both versions of transformers read the export.
        assert torch.equal(exported, expected), folder.name
