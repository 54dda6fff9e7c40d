"""SIGKILL at a counted file operation, because a timer could miss all operations on a busy machine."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
from typing import Any


class CountedKill:
    """Counts the operations of this process on partial files (`*.partial`), and kills it at one of them.

    The first round is only counted; `arm` then selects an operation of the next round.
    """

    def __init__(self) -> None:
        self._operations = itertools.count(1)
        self._last = math.inf
        sys.addaudithook(self._look)

    def arm(self, share: float) -> None:
        """Schedules the kill in the next round, after `share` (0 to 1) of the number of operations so far."""
        count = next(self._operations) - 1
        self._last = count + 1 + round(share * count)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename") or ".partial" not in str(arguments[0]):
            return
        if next(self._operations) >= self._last:
            os.kill(os.getpid(), signal.SIGKILL)
