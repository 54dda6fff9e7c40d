"""A rehearsal that skips repeated layers measures the same as one that runs every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from tests.harness import run_ranks
from tests.rehearsal.table import ATTENTION, EP8, FULL, KEEP, SHORT, Layout, case_of

LAYOUTS = (
    Layout("Qwen3-8B", 5, 8, 0, ()),
    Layout("Qwen3-8B", 5, 8, 0, (KEEP, FULL, "training.microbatch_tokens=352")),
    Layout("Qwen3-30B-A3B", 4, 8, 0, (EP8, ATTENTION)),
)


def _recording(again: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """`again`, with a record of its calls but not of their tensors, which a mock would keep alive."""

    def recording(*args: Any) -> Any:
        calls.append(None)
        return again(*args)

    return recording


def _steps(rank: int, world_size: int) -> list[tuple[Any, Any, int]]:
    """Measurements with and without skipped layers, and the number of skipped calls, by layout."""
    import torch.distributed as dist

    from nemo_popsd.rehearsal import rank as rehearsal
    from nemo_popsd.rehearsal.repeated import _Repeated

    @contextmanager
    def every_layer_runs(meter: Any, *, overlap: bool) -> Iterator[None]:
        yield

    dist.destroy_process_group()
    found = []
    for layout in LAYOUTS:
        case, content = case_of(layout, SHORT)
        case = case.replace({"training.prompts_per_step": 2 * case.layout.data})
        skipped: list[None] = []
        with mock.patch.object(_Repeated, "_again", _recording(_Repeated._again, skipped)):
            repeated = rehearsal.rehearse(case, content, layout.rank)
        with mock.patch.object(rehearsal, "repeated_layers", every_layer_runs):
            complete = rehearsal.rehearse(case, content, layout.rank)
        found.append((repeated, complete, len(skipped)))
    return found


@pytest.mark.slow
def test_skipped_layers_are_measured_as_layers_that_run() -> None:
    found: list[Any]
    [found] = run_ranks(_steps, 1)
    for layout, (repeated, complete, skipped) in zip(LAYOUTS, found, strict=True):
        assert skipped, layout
        for phase in ("frozen", "train"):
            other, cost = repeated.phases[phase], complete.phases[phase]
            assert other.flops == cost.flops > 0, (layout, phase)
            assert other.calls == cost.calls
            assert other.bytes == cost.bytes
            assert other.peak == pytest.approx(cost.peak, abs=4096), (layout, phase)
