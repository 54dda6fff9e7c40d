"""Ranks wait for each other longer than collectives of the default group do."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize, shutdown
from nemo_popsd.parallel.waiting import wait_for_all
from tests.harness import run_ranks

TIMEOUT_OF_COLLECTIVES = 3.0


def _wait(rank: int, world_size: int) -> str:
    dist.destroy_process_group()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the harness hosts the store
    initialize(ParallelConfig(), seed=1, timeout=timedelta(seconds=TIMEOUT_OF_COLLECTIVES))
    initialize(ParallelConfig(), seed=1)
    if rank == 1:
        time.sleep(1.5 * TIMEOUT_OF_COLLECTIVES)
    wait_for_all()
    if rank == 1:
        time.sleep(1.5 * TIMEOUT_OF_COLLECTIVES)
    try:
        dist.barrier()
    except RuntimeError:
        return "timed out"
    finally:
        if rank == 0:
            shutdown()
    return "passed"


@pytest.mark.slow
def test_ranks_wait_longer_than_the_timeout_of_a_collective() -> None:
    assert "timed out" in run_ranks(_wait, 2), "the collective after the wait must time out"


def _exit(rank: int, world_size: int) -> str:
    initialize(ParallelConfig(), seed=1)
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        wait_for_all()
    assert time.monotonic() - start < 60
    raise ValueError("the wait failed")


def test_the_wait_for_a_process_that_ended_fails_at_once() -> None:
    with pytest.raises(AssertionError, match="exit code 3"):
        run_ranks(_exit, 2)
