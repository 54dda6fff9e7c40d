"""Compares the plan with rehearsed steps on layouts of published models' widths (the table of docs/planning.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.rehearsal.table import LAYOUTS, SHORT, Row, measure


def _measured(rank: int, world_size: int) -> list[Row]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return [measure(layout, SHORT) for layout in LAYOUTS]


@pytest.mark.slow(90)
def test_the_plan_is_what_is_rehearsed() -> None:
    rows: list[Any]
    [rows] = run_ranks(_measured, 1)
    assert len(rows) >= 40
    assert {name: row.bytes_off for row in rows if row.bytes_off for name in [str(row.layout)]} == {}
    for row in rows:
        for peak in (row.frozen_peak, row.training_peak):
            assert peak == pytest.approx(1, abs=0.1), row
        for work in (row.frozen_work, row.training_work):
            assert work == pytest.approx(1, abs=0.01), row
        assert row.collectives > 0
