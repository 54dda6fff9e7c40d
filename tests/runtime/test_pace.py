"""Elapsed and remaining time."""

from __future__ import annotations

import pytest

from nemo_popsd.runtime.pace import Pace, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (200_000, "2 d 7:33:20")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_remaining_time_is_that_of_the_last_units() -> None:
    times = iter([100.0, 110.0, *(110.0 + step for step in range(1, 31))])
    pace = Pace(100, completed=60, clock=lambda: next(times))
    assert pace.after(61) == "elapsed 0:00:10, left 0:06:30"  # 39 units of 10 seconds
    for completed in range(62, 91):
        last = pace.after(completed)
    assert last == "elapsed 0:00:39, left 0:00:10"  # 10 units of 1 second: the slow first one no longer counts
    assert pace.after(100) == "elapsed 0:00:40"


def test_without_progress_there_is_no_estimate() -> None:
    times = iter([0.0, 5.0])
    assert Pace(10, completed=3, clock=lambda: next(times)).after(3) == "elapsed 0:00:05"
