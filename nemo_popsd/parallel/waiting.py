"""Waiting for ranks whose work takes different times.

Replicas generate responses of different lengths. A rank that waited for them in a collective of the default group would
fail after `training.collective_timeout`, which is meant for hanging ranks. Ranks therefore wait in a gloo group with a
long timeout. If a process ends during the wait, its connections close and the others fail at once.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

WAIT_LIMIT = timedelta(days=1)
"""Maximum time to wait for ranks that are still working."""

_groups: list[tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = []
"""The default group of this process and the gloo group for waiting; empty before `create_waiting_group`."""


def create_waiting_group() -> None:
    """Create the group for waiting, once per default group. Collective over the world."""
    if not (_groups and _groups[0][0] is dist.group.WORLD):
        _groups[:] = [(dist.group.WORLD, dist.new_group(backend="gloo", timeout=WAIT_LIMIT))]


def wait_for_all() -> None:
    """Return when all ranks have called it. Collective over the world: one barrier, after `create_waiting_group`."""
    [(_, group)] = _groups
    dist.barrier(group=group)
