"""Measurement of time and memory, and a description of the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.autograd.profiler import profile


def interleaved(
    actions: Mapping[str, Callable[[], None]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each action: the minimum over `repetitions`, which alternate so that other load affects all equally.

    `clock` may be `processor_time`, for actions that compute on one thread of a machine with other load.
    """
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(repetitions):
        for name, action in actions.items():
            _synchronize()
            start = clock()
            action()
            _synchronize()
            best[name] = min(best[name], clock() - start)
    return best


def processor_time() -> float:
    """Processor seconds of this process; with a GPU, wall-clock seconds."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def peak_bytes(action: Callable[[], None]) -> int:
    """Peak bytes of torch's allocator during `action` beyond those before it, including those of compiled code."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        action()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def machine() -> str:
    """One line: processor or GPU, threads, versions."""
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        return ", ".join([torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", *parts])
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    features = torch.backends.cpu.get_cpu_capability()
    return ", ".join([f"{name} ({features}), {os.cpu_count()} CPUs", f"{torch.get_num_threads()} threads", *parts])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
