"""Profiles of selected steps, and memory snapshots when a device runs out of memory, in `<output>/dumps`.

A profile is a trace of PyTorch's profiler for each rank; open it with Perfetto. View memory snapshots at
https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_popsd.observability.config import ProfileConfig
from nemo_popsd.observability.flight_recorder import FOLDER

logger = logging.getLogger(__name__)


@contextmanager
def recorded(settings: ProfileConfig, output: str | Path, *, step: int, rank: int) -> Iterator[None]:
    """Profiles the block if `step` is one of `observability.profile.steps`, and dumps memory if the device runs out.

    Args:
        settings: steps to profile, and what to record.
        output: output directory of the run, which must already belong to it.
        step: index of the step, counted from 1.
        rank: rank of this process.

    Raises:
        torch.OutOfMemoryError: the error of the block, raised again after the dump.
    """
    folder = Path(output) / FOLDER
    try:
        if step not in settings.steps:
            yield
            return
        with torch.profiler.profile(with_stack=settings.stacks, profile_memory=settings.memory) as profiler:
            yield
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"profile-step-{step:06d}-rank-{rank:04d}.json.gz"
        profiler.export_chrome_trace(str(file))
        logger.info("profile of step %d: %s", step, file)
    except torch.OutOfMemoryError:
        _dump_memory(folder / f"memory-rank-{rank:04d}.pickle")
        raise


def _dump_memory(file: Path) -> None:
    """Writes the allocator's state. Only logs a failure, since another error is being raised."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))
    except Exception as error:
        logger.error("out of memory; its state could not be written: %s", error)
    else:
        logger.error("out of memory; open %s at https://pytorch.org/memory_viz", file)
