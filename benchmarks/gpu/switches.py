"""One training step (all weights, bf16) under each switch of Megatron that one GPU can run, with the expected effect.

The loss is computed before the update and must be that of the plain run up to rounding. A switch whose library is
missing is reported with the refusal. Then the frozen states in FP8 (`benchmarks.gpu.fp8`). Overlap of communication
needs several GPUs and is not here.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import fp8
from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import ScriptedEngine, random_model, settings, start
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.limits import refuse_optimizer

_LOSS_LIMIT = 0.01
"""Largest relative difference of the loss: recomputation and fused accumulation may round the backward pass only."""

_FP8_LOSS_LIMIT = 0.5
"""The same in FP8, whose rounding moves student or target."""

SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "the others are compared with it"),
    "recompute core_attn": (
        {"student.recompute": "selective", "student.recompute_modules": ["core_attn"]},
        "same memory with fused attention",
    ),
    "recompute mlp": (
        {"student.recompute": "selective", "student.recompute_modules": ["mlp"]},
        "a third of the activations less, a fifth more time",
    ),
    "recompute half of the layers": (
        {"student.recompute": "full", "student.recompute_method": "block", "student.recompute_layers": 14},
        "half of the activations less, a sixth more time",
    ),
    "recompute all layers": ({"student.recompute": "full"}, "few activations left, a third more time"),
    "fused accumulation": ({"student.gradient_accumulation_fusion": "true"}, "less memory and time in the backward"),
    "gradients in bf16": ({"optimizer.grad_dtype": "bf16"}, "2 bytes for each weight less"),
    "moments in bf16": ({"optimizer.state_dtype": "bf16"}, "4 bytes for each weight less"),
    "half of the state on the host": ({"optimizer.host_share": 0.5}, "6 bytes for each weight less, a slow update"),
    "FP8 in the frozen passes": ({"fp8.frozen": True}, "1 byte for each weight more, frozen passes in two thirds"),
    "FP8 in training, blockwise": ({"fp8.training": True}, "2 bytes for each weight more, training in two thirds"),
    "FP8 in training, delayed": ({"fp8.training": True, "fp8.recipe": "delayed"}, "the same"),
}
"""Settings of each switch, and what is expected of it."""


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    directory, plain = random_model(work, rehearse=rehearse), 0.0
    for name, (changes, expected) in SWITCHES.items():
        try:
            measured = _step(directory, changes, rehearse=rehearse)
        except UserError as error:
            report("one step", switch=name, expected=expected, refused=f"{error.got}; need {error.need}")
            continue
        plain = plain or measured["loss"]
        limit = _FP8_LOSS_LIMIT if any(setting.startswith("fp8.") for setting in changes) else _LOSS_LIMIT
        verdict = "right" if abs(measured["loss"] / plain - 1) < limit else "WRONG"
        report("one step", switch=name, expected=expected, **measured, verdict=verdict)
    fp8.frozen_states(report, rehearse=rehearse, work=work)


def _step(directory: Path, changes: dict[str, Any], *, rehearse: bool) -> dict[str, Any]:
    """The second of two steps; the first one compiles and creates the optimizer's state."""
    config = settings(directory, rehearse=rehearse, adaptation="full")
    for setting, value in changes.items():
        section, _, field = setting.partition(".")
        setattr(getattr(config, section), field, min(value, 1) if rehearse and field.endswith("layers") else value)
    refuse_optimizer(config.optimizer)
    trained = start(config)
    engine, rng = ScriptedEngine(), random.Random(0)
    count, length = config.training.prompts_per_step, config.rollout.max_response_tokens
    engine.responses = [[rng.randrange(trained.student.vocab_size) for _ in range(length)] for _ in range(count)]
    step = trained.step(engine)
    result: dict[str, Any] = {}
    for index in (1, 2):
        engine.version = index - 1
        _reset()
        begun = time.perf_counter()
        metrics = step(index, trained.rows(1), trained.optimizer, trained.update)
        seconds = time.perf_counter() - begun
        result = {"loss": result.get("loss", metrics.loss), "step_s": seconds, "train_s": metrics.seconds_train}
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {**result, "peak_mib": peak}


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
