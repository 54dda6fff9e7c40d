"""Whether the installed modules can be imported, each in a separate process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from nemo_popsd.doctor.findings import Finding

NEEDED = (
    "torch",
    "transformers",
    "lightning.pytorch",
    "nemo.core",
    "megatron.core",
    "nemo_popsd.commands.entry",
)
"""`nemo_popsd.commands.entry` imports megatron.bridge with the substitutes that a machine without CUDA needs."""

ON_GPU = ("transformer_engine.pytorch", "megatron.bridge")
"""Modules that import Transformer Engine; needed if it is installed and there are CUDA devices."""

_NEED_A_DRIVER = ("libcuda", "nvidia driver", "cuda driver", "no cuda-capable device", "found no nvidia")


def examine_imports(devices: Sequence[str], *, seconds: float = 300.0) -> list[Finding]:
    """One finding for each module. Without a CUDA device, a module that fails for lack of a driver is not judged.

    Args:
        devices: from `machine.cuda_devices`.
        seconds: time limit of each import.
    """
    fused = bool(devices) and importlib.util.find_spec("transformer_engine") is not None
    findings = [_examine(module, needed=True, judged=bool(devices), seconds=seconds) for module in NEEDED]
    return [
        *findings,
        *(_examine(module, needed=fused, judged=bool(devices), seconds=seconds) for module in ON_GPU),
    ]


def _examine(module: str, *, needed: bool, judged: bool, seconds: float) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Finding("imports", module, "failed", f"not imported within {seconds:g} s")
    if done.returncode == 0:
        return Finding("imports", module, "ok", "imported")
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"exit status {done.returncode}"
    if not judged and any(word in done.stderr.lower() for word in _NEED_A_DRIVER):
        return Finding("imports", module, "optional", reason, note="cannot be tested without a GPU driver")
    return Finding("imports", module, "failed" if needed else "optional", reason)
