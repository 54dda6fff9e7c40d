"""Wall-clock seconds and peak device memory of the named phases of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates the seconds of named phases.

    If CUDA is in use, each phase waits for the device at its start and end (two synchronizations per phase), so that
    the time of a kernel counts for the phase that launched it. On a CPU it only reads the clock twice.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._peaks: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`, even if the block raises.

        Phases may repeat and nest. The peak memory of an outer phase counts only from the start of its inner phase on.
        """
        _wait_for_device()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            with _named_range(name):
                yield
                _wait_for_device()
        finally:
            self._seconds[name] += time.perf_counter() - start
            if torch.cuda.is_initialized():
                self._peaks[name] = max(self._peaks[name], torch.cuda.max_memory_allocated())

    def seconds(self, name: str) -> float:
        """Seconds of `name` since the last `reset`; 0 for a phase that did not run."""
        return self._seconds.get(name, 0.0)

    def peak_bytes(self, name: str) -> int:
        """Peak bytes of tensors on the device in `name` since the last `reset`; 0 without CUDA."""
        return self._peaks.get(name, 0)

    def reset(self) -> None:
        """Resets all phases to 0."""
        self._seconds.clear()
        self._peaks.clear()


@contextmanager
def _named_range(name: str) -> Iterator[None]:
    """A range with the name of the phase in profiles and, with CUDA, in Nsight Systems (NVTX)."""
    with torch.profiler.record_function(f"popsd.{name}"):
        if not torch.cuda.is_initialized():
            yield
            return
        torch.cuda.nvtx.range_push(f"popsd.{name}")
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
