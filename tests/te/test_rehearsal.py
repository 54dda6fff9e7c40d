"""Compares a rehearsal on Transformer Engine's layers, with emulated kernels, with the plan for the layers of a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.rehearsal.table import FULL, KEEP, SHORT, Layout, Row, measure

pytestmark = [on_transformer_engine, pytest.mark.slow]

LAYOUTS = (Layout("Qwen3-8B", 2, 8, 0, (FULL,)), Layout("Qwen3-8B", 2, 8, 0, (KEEP,)))


def _measured(rank: int, world_size: int) -> list[Row]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return [measure(layout, SHORT, layers="fused") for layout in LAYOUTS]


def test_the_plan_for_a_gpu_is_what_is_rehearsed() -> None:
    rows: list[Any]
    [rows] = run_ranks(_measured, 1, layers=TRANSFORMER_ENGINE, timeout=300.0)
    for row in rows:
        assert row.bytes_off == ()
        for peak in (row.frozen_peak, row.training_peak):
            assert peak == pytest.approx(1, abs=0.1), row
        for work in (row.frozen_work, row.training_work):
            assert work == pytest.approx(1, abs=0.01), row
