"""Waiting for ranks whose work takes unequally long.

Replicas draw responses of unequal lengths, and ranks that wait for them in a collective of the default group fail after
`training.collective_timeout`, which is meant for ranks that have hung. Here they wait in a gloo group with patience. A
rank that dies meanwhile closes its connections, and the others fail at once.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=1)
"""How long ranks wait for one that is alive."""

_made: list[tuple[Any, Any]] = []
"""The default group of this process, and the group that waits."""


def prepare_meeting() -> None:
    """Makes the group that waits, once for each default group. Collective over the world."""
    if not (_made and _made[0][0] is dist.group.WORLD):
        _made[:] = [(dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE))]


def wait_for_all() -> None:
    """Returns when all ranks are here. Collective over the world: one barrier, after `prepare_meeting`."""
    [(_, group)] = _made
    dist.barrier(group=group)
