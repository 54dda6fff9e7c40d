"""Determines the process that logs and prints."""

from __future__ import annotations

from nemo_popsd.parallel.launcher import rank


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of the run, from the launcher's ``RANK``.

    Lightning's rank cannot be used: every rank has its own Trainer with one device, whose global rank is 0.
    """
    return rank() == 0
