"""Layers that are left out count as if they had been carried out."""

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


def _noted(again: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """`again`, which notes its calls without their tensors: a mock would keep these alive."""

    def noted(*args: Any) -> Any:
        calls.append(None)
        return again(*args)

    return noted


def _steps(rank: int, world_size: int) -> list[tuple[Any, Any, int]]:
    """What is measured with and without repetition, and the number of layers' passes that are left out."""
    import torch.distributed as dist

    from nemo_popsd.rehearsal import rank as rehearsal
    from nemo_popsd.rehearsal.repeated import _Repeated

    @contextmanager
    def each_carried_out(meter: Any, *, overlap: bool) -> Iterator[None]:
        yield

    dist.destroy_process_group()
    found = []
    for layout in LAYOUTS:
        case, content = case_of(layout, SHORT)
        case = case.replace({"training.prompts_per_step": 2 * case.layout.data})
        left_out: list[None] = []
        with mock.patch.object(_Repeated, "_again", _noted(_Repeated._again, left_out)):
            repeated = rehearsal.rehearse(case, content, layout.rank)
        with mock.patch.object(rehearsal, "repeated_layers", each_carried_out):
            carried_out = rehearsal.rehearse(case, content, layout.rank)
        found.append((repeated, carried_out, len(left_out)))
    return found


@pytest.mark.slow
def test_what_is_left_out_counts_as_if_it_had_been_carried_out() -> None:
    found: list[Any]
    [found] = run_ranks(_steps, 1)
    for layout, (repeated, carried_out, left_out) in zip(LAYOUTS, found, strict=True):
        assert left_out, layout
        for phase in ("frozen", "train"):
            other, cost = repeated.phases[phase], carried_out.phases[phase]
            assert other.flops == cost.flops > 0, (layout, phase)
            assert other.calls == cost.calls
            assert other.bytes == cost.bytes
            assert other.peak == pytest.approx(cost.peak, abs=4096), (layout, phase)
