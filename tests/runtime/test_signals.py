from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from nemo_popsd.errors import StopRequested
from nemo_popsd.megatron.config import ParallelConfig
from tests.harness import run_ranks


def _decode(rank: int, world_size: int, tensor: int) -> dict[str, Any]:
    """Rank 1 gets the signal while the ranks decode; all must leave at the same token."""
    import torch.distributed as dist

    from nemo_popsd.runtime.distributed import initialize
    from nemo_popsd.runtime.signals import StopSignals

    initialize(ParallelConfig(tensor=tensor), seed=1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = StopSignals()
    stop.install()
    stop.raise_if_requested()
    looks = 0
    while looks < 20_000 and not stop.while_decoding():
        looks += 1
        if rank == 1 and looks == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.0005)
    knows = stop.requested
    with pytest.raises(StopRequested):
        stop.raise_if_requested()
    dist.barrier()
    stop.uninstall()
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return {"looks": looks, "knew": knows, "restored": before == after}


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_signal_to_one_rank_cuts_the_decoding_of_all_short(tensor: int) -> None:
    zero, one = run_ranks(_decode, 2, tensor)
    assert (zero["knew"], one["knew"]) == (False, True)
    assert zero["looks"] < 20_000
    assert one["looks"] < 20_000
    if tensor == 2:
        assert zero["looks"] == one["looks"]
    assert zero["restored"]
    assert one["restored"]


def _while_waiting(rank: int, world_size: int) -> bool:
    """Rank 1 gets the signal while it waits inside a collective, where Python's handlers do not run."""
    import threading

    from nemo_popsd.runtime.distributed import initialize, on_any_rank
    from nemo_popsd.runtime.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    stop = StopSignals()
    stop.install()
    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        on_any_rank(False)
        return True
    deadline = time.monotonic() + 30
    told = False
    while not told and time.monotonic() < deadline:
        told = stop.while_decoding()
        time.sleep(0.001)
    on_any_rank(False)
    return told


def test_a_rank_that_waits_in_a_collective_passes_the_signal_on() -> None:
    assert run_ranks(_while_waiting, 2) == [True, True]


def _another_handler(rank: int, world_size: int) -> bool:
    """Somebody takes the signal after us, as Lightning does; `retake` takes it back."""
    from nemo_popsd.runtime.distributed import initialize
    from nemo_popsd.runtime.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    stop = StopSignals()
    stop.retake()
    stop.install()
    signal.signal(signal.SIGTERM, lambda *_: None)
    stop.retake()
    os.kill(os.getpid(), signal.SIGTERM)
    return stop.requested


def test_the_signals_can_be_taken_back() -> None:
    assert run_ranks(_another_handler, 1) == [True]
