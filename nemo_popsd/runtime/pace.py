"""Elapsed and remaining time of work that is counted in units, for progress messages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_MEASURED_UNITS = 16


class Pace:
    """Elapsed time, and remaining time at the pace of the last units.

    Args:
        total: total number of units.
        completed: number of units completed before this process started.
        clock: returns seconds; tests replace it.
    """

    def __init__(self, total: int, *, completed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._start = clock()
        self._recent = deque([(completed, self._start)], maxlen=_MEASURED_UNITS + 1)

    def after(self, completed: int) -> str:
        """Format the times after `completed` units, e.g. ``"elapsed 0:01:30, left 0:04:30"``."""
        now = self._clock()
        self._recent.append((completed, now))
        first, then = self._recent[0]
        text = f"elapsed {duration(now - self._start)}"
        if completed <= first or completed >= self._total:
            return text
        return f"{text}, left {duration((now - then) / (completed - first) * (self._total - completed))}"


def duration(seconds: float) -> str:
    """Format `seconds` as ``"0:01:30"``, preceded by days if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
