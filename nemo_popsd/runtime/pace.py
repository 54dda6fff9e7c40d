"""Elapsed and remaining time of work that is counted in units, for lines of progress."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_MEASURED_UNITS = 16


class Pace:
    """How long work has taken, and how long it will take at the pace of the last units.

    Args:
        total: units of the work.
        completed: units that were done before this process began.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, *, completed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._start = clock()
        self._recent = deque([(completed, self._start)], maxlen=_MEASURED_UNITS + 1)

    def after(self, completed: int) -> str:
        """The times when `completed` units are done, e.g. ``"elapsed 0:01:30, left 0:04:30"``."""
        now = self._clock()
        self._recent.append((completed, now))
        first, then = self._recent[0]
        text = f"elapsed {duration(now - self._start)}"
        if completed <= first or completed >= self._total:
            return text
        return f"{text}, left {duration((now - then) / (completed - first) * (self._total - completed))}"


def duration(seconds: float) -> str:
    """`seconds` as ``"0:01:30"``, with days in front if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
