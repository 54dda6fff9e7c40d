"""Golden losses: five steps of conf/tiny.yaml give recorded losses, so that no change alters arithmetic unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.model.runs import TINY, metrics

pytestmark = pytest.mark.slow

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
    "tensor parallel": (2, ["parallel.tensor=2"]),
}
"""By name: ranks and settings."""

TORCH = "2.13.0+cpu"
"""The version of torch that the losses were recorded with, with one thread."""
PROCESSOR = "AuthenticAMD 25 17"
"""Vendor, family and model of the processor that they were recorded on."""
RECORDED = {
    "AVX2": {
        "full": [
            0.002946153748780489,
            0.004896128084510565,
            0.0028932231944054365,
            0.003020424861460924,
            0.0037319145631045103,
        ],
        "lora": [
            0.002946153748780489,
            0.004900532308965921,
            0.002897339640185237,
            0.003032539738342166,
            0.003743022447451949,
        ],
        "tensor parallel": [
            0.0029461535159498453,
            0.004896124824881554,
            0.002893218072131276,
            0.0030204197391867638,
            0.003731911303475499,
        ],
    },
    "AVX512": {
        "full": [
            0.0029461542144417763,
            0.004896129015833139,
            0.002893220167607069,
            0.003020426258444786,
            0.0037319136317819357,
        ],
        "lora": [
            0.0029461542144417763,
            0.0049005309119820595,
            0.002897335682064295,
            0.0030325395055115223,
            0.0037430243100970984,
        ],
        "tensor parallel": [
            0.0029461549129337072,
            0.004896126687526703,
            0.0028932197019457817,
            0.003020418109372258,
            0.0037319129332900047,
        ],
    },
}
"""Loss of each step by the instruction set that torch uses and the run: on that processor the losses are bit-equal."""

TOLERANCE = 1e-5
"""Relative, with another torch, processor or instruction set. Its kernels sum fp32 products in another order; between
AVX2, AVX512 and one or two ranks that moves these losses by at most 2e-6. 1e-5 leaves a factor of five, and is far
below any change of the mathematics: a step without one of the branches, or with a token more, moves a loss by more
than 1e-3."""


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
