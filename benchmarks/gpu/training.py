"""The start-up self-check, three steps (LoRA, bf16, packed), and the peak memory of each phase compared with the plan.

The responses are written to the folder that the parts share, so that the CPU can repeat the steps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import RESPONSES, STEPS, KeepingEngine, Run, random_model, settings, start
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.megatron.spec import chosen_layers
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.memory import memory
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from nemo_popsd.training import self_check
from nemo_popsd.training.objective import Objective

_PHASES = {"rollout": "rollout", "frozen": "frozen", "train": "training"}
"""Name of each phase in the stopwatch to its name in the planner."""


class _MemoryWatch(Stopwatch):
    """Also records the peak bytes of torch's allocator in each phase."""

    peaks: dict[str, int] = {}  # noqa: RUF012  (shared by the process: each step makes a stopwatch)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Stopwatch`."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with super().phase(name):
            yield
        if torch.cuda.is_available():
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    trained = start(settings(random_model(work, rehearse=rehearse), rehearse=rehearse))
    config = trained.config
    layers = chosen_layers(config.student.layers)
    report("run", layers=layers, adaptation=config.student.adaptation, precision=config.student.precision)
    _self_check(report, trained)
    engine = KeepingEngine(trained.engine())
    kept = []
    with patch("nemo_popsd.training.step.Stopwatch", _MemoryWatch):
        step = trained.step(engine)
        for index in range(1, STEPS + 1):
            metrics = step(index, trained.rows(index), trained.optimizer, trained.update)
            kept.append({"responses": engine.responses, "loss": metrics.loss, "grad_norm": metrics.grad_norm})
            (work / RESPONSES).write_text(json.dumps(kept))
            report(
                "steps",
                step=index,
                loss=metrics.loss,
                grad_norm=metrics.grad_norm,
                rollout_s=metrics.seconds_rollout,
                frozen_s=metrics.seconds_frozen,
                train_s=metrics.seconds_train,
            )
    plan = PlanConfig(gpus_per_node=1)
    plan.workload.layers = "plain" if layers == "local" else "fused"
    planned = memory(Case(config, plan, read_sizes(config.student.source)[0], 1))
    for name, phase in _PHASES.items():
        measured = _MemoryWatch.peaks.get(name)
        report(
            "peak memory",
            phase=phase,
            planned_mib=planned.peak(phase) / 2**20,
            measured_mib=None if measured is None else measured / 2**20,
            measured_over_planned=None if measured is None else measured / planned.peak(phase),
        )


def _self_check(report: Report, trained: Run) -> None:
    """Runs the check with references as responses; its loss and gradient norm are taken from its log record."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    logging.getLogger(self_check.__name__).addHandler(handler)
    section = trained.config.distillation
    objective = Objective(
        trained.student,
        build_target(section.target),
        build_divergence(section.divergence),
        chunk_tokens=section.chunk_tokens,
        fused=section.fused,
    )
    sequences = [ContextSequence(row.contexts.student, row.contexts.reference) for row in trained.rows(0)]
    verdict = "passed"
    try:
        self_check.check_student_equals_base(
            trained.student,
            trained.optimizer,
            objective,
            sequences,
            trained.config.training.microbatch_tokens,
            packed=True,
        )
    except RuntimeError as error:
        verdict = str(error)
    loss, norm = found[0].args if found and isinstance(found[0].args, tuple) else (None, None)
    report("self-check", loss_at_most=loss, grad_norm=norm, verdict=verdict)
