"""Every random generator of a process is saved and restored."""

from __future__ import annotations

from typing import Any

from tests.harness import run_ranks


def _random_numbers(rank: int, world_size: int) -> list[Any]:
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.runtime.random_state import capture_random_state, restore_random_state

    def numbers() -> list[float]:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(1).item()
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), inside]

    initialize(ParallelConfig(), seed=3)
    numbers()
    state = capture_random_state()
    first = numbers()
    numbers()
    restore_random_state(state)
    return [first, numbers(), numbers()]


def test_every_generator_is_restored() -> None:
    [[first, again, later]] = run_ranks(_random_numbers, 1)
    assert first == again
    assert not set(first) & set(later)
