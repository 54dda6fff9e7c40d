"""Which process logs and prints."""

from __future__ import annotations

from nemo_popsd.parallel.launcher import rank


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of the run, from the launcher's ``RANK``.

    Lightning does not know: every rank has its own Trainer with one device, and each Trainer has global rank 0.
    """
    return rank() == 0
