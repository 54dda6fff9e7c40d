"""Which process speaks for all."""

from __future__ import annotations

from nemo_popsd.parallel.launcher import rank


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of the whole run, from the launcher's ``RANK``.

    Lightning cannot say: every rank runs a Trainer of its own with one device, and each believes to be global rank 0.
    """
    return rank() == 0
