"""Repeats the steps of `training` on the CPU in fp32, on the same responses, and compares losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import RESPONSES, ScriptedEngine, random_model, settings, start

_LOSS_LIMIT, _NORM_LIMIT = 0.03, 0.1
"""Largest relative differences between the same computation in bf16 on a GPU and in fp32."""


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    kept = json.loads((work / RESPONSES).read_text())
    repeated = start(settings(random_model(work, rehearse=rehearse), rehearse=rehearse, precision="fp32"))
    engine = ScriptedEngine()
    step = repeated.step(engine)
    for index, there in enumerate(kept, 1):
        engine.responses, engine.version = there["responses"], index - 1
        here = step(index, repeated.rows(index), repeated.optimizer, repeated.update)
        loss = abs(there["loss"] / here.loss - 1)
        norm = abs(there["grad_norm"] / here.grad_norm - 1)
        report(
            "bf16 there, fp32 on the CPU",
            step=index,
            loss_there=there["loss"],
            loss_cpu=here.loss,
            loss_difference=loss,
            norm_there=there["grad_norm"],
            norm_cpu=here.grad_norm,
            norm_difference=norm,
            verdict="right" if loss < _LOSS_LIMIT and norm < _NORM_LIMIT else "WRONG",
            seconds=here.seconds_frozen + here.seconds_train,
        )
