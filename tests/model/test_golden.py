"""Golden losses: five steps of conf/tiny.yaml give recorded losses, so that no change alters arithmetic unnoticed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.model.runs import TINY, metrics

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
SETTINGS = [
    "data.validation.path=",
    "training.steps=5",
    "training.prompts_per_step=8",
    "rollout.max_response_tokens=48",
    "optimizer.warmup_steps=1",
    "observability.progress_bar=false",
    "diagnosis.in_training=false",
    "training.export_huggingface=false",
]
RUNS = {
    "full": (1, []),
    "lora": (1, ["student.adaptation=lora", "student.lora.rank=8"]),
    "tensor parallel": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "padded": (1, ["training.packing=false"]),
}
"""By name: ranks and settings. All but the last one pack sequences; the responses are those of the Megatron engine."""

TORCH = "2.13.0+cpu"
"""The version of torch that the losses were recorded with, with one thread."""
PROCESSOR = "AuthenticAMD 25 17"
"""Vendor, family and model of the processor that they were recorded on."""
RECORDED = {
    "AVX2": {
        "full": [
            0.003097924869507551,
            0.00558261014521122,
            0.0048396997153759,
            0.0029395492747426033,
            0.006304258480668068,
        ],
        "lora": [
            0.003097924869507551,
            0.005639330949634314,
            0.00477857980877161,
            0.0029428598936647177,
            0.0063208239153027534,
        ],
        "tensor parallel": [
            0.0030979239381849766,
            0.0055826096795499325,
            0.004839701112359762,
            0.0029395469464361668,
            0.006304249633103609,
        ],
        "padded": [
            0.0030979246366769075,
            0.005582608748227358,
            0.004839698784053326,
            0.002939548809081316,
            0.006304258015006781,
        ],
    },
    "AVX512": {
        "full": [
            0.0030979213770478964,
            0.0055826096795499325,
            0.004839699249714613,
            0.0029395485762506723,
            0.0063042547553777695,
        ],
        "lora": [
            0.0030979213770478964,
            0.005639328621327877,
            0.004778578877449036,
            0.002942858962342143,
            0.006320817396044731,
        ],
        "tensor parallel": [
            0.003097920212894678,
            0.0055826096795499325,
            0.004839700646698475,
            0.002939546015113592,
            0.006304251495748758,
        ],
        "padded": [
            0.0030979225412011147,
            0.00558261014521122,
            0.004839698784053326,
            0.002939548809081316,
            0.006304257083684206,
        ],
    },
}
"""Loss of each step by the instruction set that torch uses and the run: on that processor the losses are bit-equal."""

TOLERANCE = 1e-5
"""Relative, with another torch, processor or instruction set. Its kernels sum fp32 products in another order; between
AVX2, AVX512 and one or two ranks that moves these losses by at most 2e-6. 1e-5 leaves a factor of five, and is far
below any change of the mathematics: a step without one of the branches, or with a token more, moves a loss by more
than 1e-3."""


def test_a_change_of_the_recorded_losses_is_declared_in_the_changelog() -> None:
    digest = hashlib.sha256(json.dumps(RECORDED, sort_keys=True).encode()).hexdigest()[:12]
    declared = re.findall(r"golden losses `([0-9a-f]{12})`", CHANGELOG.read_text())
    assert declared, f"name the golden losses `{digest}` in CHANGELOG.md"
    assert declared[0] == digest, f"CHANGELOG.md declares {declared[0]}: say what changed the losses, and name {digest}"


def _losses(rank: int, world_size: int, output: Path, words: list[str]) -> tuple[int, tuple[str, str, str]]:
    from nemo_popsd.cli.main import main

    status = main(["train", TINY, f"output={output}", *SETTINGS, *words])
    return status, (torch.__version__, _processor(), torch.backends.cpu.get_cpu_capability())


def _processor() -> str:
    """Vendor, family and model: MKL chooses its kernels by them. Empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    keys = ("vendor_id", "cpu family", "model")
    values = dict(reversed([[word.strip() for word in line.split(":", 1)] for line in lines if ":" in line]))
    return " ".join(values.get(key, "") for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_five_steps_of_the_tiny_run_give_the_recorded_losses(tmp_path: Path, name: str) -> None:
    ranks, words = RUNS[name]
    results: list[Any] = run_ranks(_losses, ranks, tmp_path / "run", words, timeout=300.0)
    assert [status for status, _ in results] == [0] * ranks
    losses = [value for _, value in metrics(tmp_path / "run", "train/loss")]
    (machine,) = {machine for _, machine in results}
    torch_version, processor, capability = machine
    if (torch_version, processor) == (TORCH, PROCESSOR) and capability in RECORDED:
        assert losses == RECORDED[capability][name]
    else:
        assert losses == pytest.approx(RECORDED["AVX2"][name], rel=TOLERANCE)
