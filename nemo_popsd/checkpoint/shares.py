"""Bytes that each rank wrote or read of a checkpoint, and the seconds that this took, for the log."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass
class Share:
    """The part of one rank."""

    bytes: int = 0
    """Bytes written or read, without small files."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, in order."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def gathered(share: Share) -> list[Share]:
    """The shares of all ranks. Collective over the world: one gather of objects."""
    shares = [share] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares


def summary(shares: Sequence[Share]) -> str:
    """One line with total bytes and bytes per rank, and for each phase the mean over the ranks and the slowest rank.

    Example: ``141.1 GB by 16 of 16 ranks, 8.7 GB to 8.9 GB each; staged in 0.4 s, rank 3 in 0.5 s, written in ...``
    """
    sizes = [share.bytes for share in shares if share.bytes]
    text = _size(sum(sizes))
    if len(shares) > 1:
        text += f" by {len(sizes)} of {len(shares)} ranks"
        text += f", {_size(min(sizes))} to {_size(max(sizes))} each" if sizes else ""
    phases = dict.fromkeys(phase for share in shares for phase in share.seconds)
    return "; ".join([text, ", ".join(_phase(phase, [s.seconds.get(phase, 0.0) for s in shares]) for phase in phases)])


def _phase(name: str, seconds: Sequence[float]) -> str:
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    if len(seconds) == 1:
        return f"{name} in {seconds[0]:.1f} s"
    return f"{name} in {statistics.mean(seconds):.1f} s, rank {slowest} in {seconds[slowest]:.1f} s"


def _size(size: int) -> str:
    unit, scale = next((unit, scale) for unit, scale in _UNITS if size >= scale or unit == "kB")
    return f"{size / scale:.1f} {unit}"
