"""Measures the seconds until a vLLM server on this machine has new weights: adapters only, and all weights.

`POPSD_VLLM_PYTHON` names the Python of vLLM's environment; without it, vLLM must be installed in this environment. A
rehearsal starts no server unless it is set.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Report


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    python = os.environ.get("POPSD_VLLM_PYTHON", "")
    if not python and not rehearse and importlib.util.find_spec("vllm") is not None:
        python = sys.executable
    if not python:
        report("updates", kind="not measured: vLLM is not installed (set POPSD_VLLM_PYTHON)")
        return
    _measure(report, python, rehearse=rehearse, work=work)


def _measure(report: Report, python: str, *, rehearse: bool, work: Path) -> None:
    from benchmarks.gpu.model import random_model, settings, start
    from nemo_popsd.model.engines import build_engine
    from nemo_popsd.rollout.engine import Request, SamplingParams

    config = settings(random_model(work, rehearse=rehearse), rehearse=rehearse)
    config.output = str(work / "serving")
    config.rollout.engine = "vllm"
    vllm = config.rollout.vllm
    vllm.python, vllm.eager, vllm.sleep, vllm.start_seconds = python, True, False, 120
    model = start(config)
    for kind in ("adapter", "merged"):
        vllm.lora = kind
        version = [0]
        engine: Any = build_engine(
            config,
            model.student,
            model.architecture,
            weights_version=lambda version=version: version[0],
            longest=lambda: 64,
            stop_requested=lambda: False,
        )
        try:
            for version[0] in range(4):
                engine.generate([Request([1, 2, 3], seed=1)], SamplingParams(1.0, 1.0, 0, 2, frozenset()))
                update = engine.last_update
                report("updates", kind=kind, version=version[0], mib=update.bytes / 2**20, seconds=update.seconds)
        finally:
            engine.close()
