from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.speed import measure


class Slow:
    """Takes longer the first time."""

    calls = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        time.sleep(0.05 if self.calls else 0.4)
        self.calls += 1
        return [Rollout([1] * (number + 1), [0.0] * (number + 1), True, 0) for number, _ in enumerate(requests)]


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_first_call_counts_only_when_asked(warm_up: bool) -> None:
    engine = Slow()
    speed = measure(
        engine, [Request([5], n) for n in range(3)], SamplingParams(1.0, 1.0, 0, 4, frozenset()), warm_up=warm_up
    )
    assert (speed.rows, speed.tokens, engine.calls) == (3, 6, 2 if warm_up else 1)
    assert speed.seconds >= 0.05
    assert (speed.seconds < 0.4) == warm_up
    assert speed.tokens_per_second == pytest.approx(6 / speed.seconds)
