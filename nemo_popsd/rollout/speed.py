"""How fast an engine draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.rollout.engine import Request, RolloutEngine, SamplingParams


@dataclass(frozen=True)
class Speed:
    """Of one call, prompts not counted."""

    rows: int
    tokens: int
    """Of the responses."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over all rows together."""
        return self.tokens / self.seconds


def measure(
    engine: RolloutEngine, requests: Sequence[Request], sampling: SamplingParams, *, warm_up: bool = True
) -> Speed:
    """Times one call of `generate`. Collective as that is.

    Args:
        engine: any.
        requests: drawn together.
        sampling: how.
        warm_up: call it once before, so that neither a server's start, nor a transfer of weights, nor the building of
            kernels counts.
    """
    if warm_up:
        engine.generate(requests, sampling)
    begun = time.perf_counter()
    rollouts = engine.generate(requests, sampling)
    return Speed(len(rollouts), sum(len(r.response) for r in rollouts), time.perf_counter() - begun)
