"""Compares frozen states in FP8 by Transformer Engine's kernels with the emulation on local layers, and times them.

Expected: an error, relative to bf16, like that of the emulation, and linears that take half to two thirds of the time.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import Run, random_model, settings, start
from nemo_popsd.diagnosis.fp8 import layer_linears
from nemo_popsd.diagnosis.fp8_rounding import emulated
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.fp8 import in_fp8
from nemo_popsd.megatron.microbatches import ContextSequence

_RECIPES = ("tensorwise", "blockwise")
_EXPECTED = (0.5, 2.0)
"""Expected range of the error relative to that of the emulation; a wrong scale would change it by a factor of 16."""


def frozen_states(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    directory = random_model(work, rehearse=rehearse)
    config = settings(directory, rehearse=rehearse)
    config.student.layers = "local"
    plain = start(config)
    exact, _ = _states(plain, FP8Config())
    errors = {}
    for recipe in _RECIPES:
        with plain.student.base.model() as base, emulated(layer_linears(base), recipe):
            errors[recipe] = _error(_states(plain, FP8Config())[0], exact)
    config.student.layers = "auto"
    for recipe, of_emulation in errors.items():
        config.fp8 = FP8Config(frozen=True, recipe=recipe)
        try:
            measured = start(config)
        except UserError as error:
            report("frozen states", recipe=recipe, emulated=of_emulation, refused=f"{error.got}; need {error.need}")
            continue
        in_bf16, seconds = _states(measured, FP8Config())
        rounded, seconds_fp8 = _states(measured, config.fp8)
        ratio = (found := _error(rounded, in_bf16)) / of_emulation
        report(
            "frozen states",
            recipe=recipe,
            emulated=of_emulation,
            error=found,
            bf16_s=seconds,
            fp8_s=seconds_fp8,
            verdict="right" if _EXPECTED[0] < ratio < _EXPECTED[1] else "WRONG",
        )


def _states(run: Run, fp8: FP8Config) -> tuple[Tensor, float]:
    """States of the base at the responses, and the seconds of the second of two passes."""
    rng, length = random.Random(0), run.config.rollout.max_response_tokens
    responses = [[rng.randrange(run.student.vocab_size) for _ in range(length)] for _ in run.rows(1)]
    prompts = [row.contexts.privileged for row in run.rows(1)]
    sequences = [ContextSequence(*pair) for pair in zip(prompts, responses, strict=True)]
    states, seconds = torch.zeros(0), 0.0
    with run.student.base.model() as base, in_fp8(base, fp8, "frozen"):
        batches = student_batches(base, sequences, run.config.training.frozen_tokens, packed=True)
        for _ in range(2):
            begun = time.perf_counter()
            states = torch.cat(frozen_hidden_states(base, batches)).float().cpu()  # waits for the device
            seconds = time.perf_counter() - begun
    return states, seconds


def _error(states: Tensor, exact: Tensor) -> float:
    return float((states - exact).norm() / exact.norm())
