"""One training step (all weights, bf16) under each switch of Megatron that one GPU can run, with the expected effect.

The loss is computed before the update and must be that of the plain run up to rounding. A switch whose library is
missing is reported with the error. Afterwards frozen states in FP8 are compared (`benchmarks.gpu.fp8`). Switches that
need several GPUs are listed with their needs and the expected effect; this part has one process and does not run them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import fp8
from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import ScriptedEngine, random_model, settings, start
from nemo_popsd.config.loading import load_schema
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.limits import refuse_optimizer

_LOSS_LIMIT = 0.01
"""Largest relative difference of the loss: recomputation and fused accumulation may round the backward pass only."""

_FP8_LOSS_LIMIT = 0.5
"""The same limit for FP8, whose rounding shifts student or target."""

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
"""Settings and expected effect of each switch."""

_CONTEXT = ("parallel.context=2", "training.packing=false")
_SHARED_EXPERTS = ("parallel.tensor=2", "parallel.expert=2")

SWITCHES_OF_SEVERAL: dict[str, tuple[int, tuple[str, ...], str]] = {
    "overlap of the gradients' reduction": (
        2,
        ("optimizer.overlap_grad_reduce=true",),
        "full fine-tuning: all but the last bucket's reduction hidden behind the backward; LoRA: nothing",
    ),
    "overlap of the weights' gather": (
        2,
        ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true", "training.updates_per_step=2"),
        "full fine-tuning: the gather between the updates of a step hidden behind the forward",
    ),
    "overlap of transfers between stages": (
        2,
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap_transfers=true"),
        "transfers hidden behind the other model chunk",
    ),
    "sequence parallelism": (
        2,
        ("parallel.tensor=2", "parallel.sequence=true"),
        "norms and residuals on half of the tokens, the same bytes",
    ),
    "user buffers": (
        2,
        ("parallel.tensor=2", "megatron.model.tp_comm_overlap=true"),
        "tensor-parallel gathers hidden behind products, if micro-batches had one shape",
    ),
    "context, p2p": (
        2,
        ("parallel.context=2", "parallel.context_type=p2p"),
        "half of the activations; the ring hidden behind attention from some thousand tokens a rank on",
    ),
    "context, all_gather": (
        2,
        (*_CONTEXT, "parallel.context_type=all_gather"),
        "half of the activations; keys and values of all tokens in memory, a gather that nothing hides",
    ),
    "context, a2a": (
        2,
        (*_CONTEXT, "parallel.context_type=a2a"),
        "half of the activations; nothing hides the exchange, of fewer bytes than p2p's on many ranks",
    ),
    "context, a2a+p2p": (
        4,
        (*_CONTEXT, "parallel.context=4", "parallel.context_type=a2a+p2p", "parallel.context_sizes=[2,2]"),
        "a quarter of the activations; a ring of two nodes instead of four ranks",
    ),
    "experts complete": (4, _SHARED_EXPERTS, "exchanged tokens alone"),
    "experts split": (
        4,
        (*_SHARED_EXPERTS, "parallel.expert_tensor=2"),
        "half of the experts' memory; tokens also gathered and summed over two ranks, so slower",
    ),
}
"""GPUs, settings and expected effect of the switches that one GPU cannot run."""


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
    for name, (gpus, overrides, expected) in SWITCHES_OF_SEVERAL.items():
        reason = _because(gpus, overrides)
        report("not run", switch=name, settings=" ".join(overrides), expected=expected, because=reason)
    fp8.frozen_states(report, rehearse=rehearse, work=work)


def _because(gpus: int, overrides: Sequence[str]) -> str:
    """Why a switch for `gpus` GPUs does not run here: the number of GPUs, or the error for its settings."""
    try:
        load_schema(PopsdConfig, {}, overrides, what="switch")
    except UserError as error:
        return f"{error.got}; need {error.need}"
    return f"needs {gpus} GPUs"


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
