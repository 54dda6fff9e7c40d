from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.errors import SAVED_AND_STOPPED, StopRequested
from nemo_popsd.parallel.config import ParallelConfig
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]


def _decode(rank: int, world_size: int, tensor: int) -> dict[str, Any]:
    """Rank 1 gets the signal while the ranks decode; all must stop at the same token."""
    import torch.distributed as dist

    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.parallel.signals import StopSignals

    initialize(ParallelConfig(tensor=tensor), seed=1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = StopSignals()
    stop.install()
    stop.raise_if_requested()
    steps = 0
    while steps < 20_000 and not stop.while_decoding():
        steps += 1
        if rank == 1 and steps == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.0005)
    received = stop.requested
    with pytest.raises(StopRequested):
        stop.raise_if_requested()
    dist.barrier()
    stop.uninstall()
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return {"steps": steps, "received": received, "restored": before == after}


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_signal_to_one_rank_ends_the_decoding_of_all_ranks(tensor: int) -> None:
    zero, one = run_ranks(_decode, 2, tensor)
    assert (zero["received"], one["received"]) == (False, True)
    assert zero["steps"] < 20_000
    assert one["steps"] < 20_000
    if tensor == 2:
        assert zero["steps"] == one["steps"]
    assert zero["restored"]
    assert one["restored"]


def _while_waiting(rank: int, world_size: int) -> bool:
    """Rank 1 gets the signal while it waits inside a collective, where Python's handlers do not run."""
    import threading

    from nemo_popsd.parallel.distributed import initialize, on_any_rank
    from nemo_popsd.parallel.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    stop = StopSignals()
    stop.install()
    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        on_any_rank(False)
        return True
    deadline = time.monotonic() + 30
    stopped = False
    while not stopped and time.monotonic() < deadline:
        stopped = stop.while_decoding()
        time.sleep(0.001)
    on_any_rank(False)
    return stopped


def test_a_rank_that_waits_in_a_collective_forwards_the_signal() -> None:
    assert run_ranks(_while_waiting, 2) == [True, True]


def _another_handler(rank: int, world_size: int) -> bool:
    """Another library replaces the handler, as Lightning does; `retake` installs it again."""
    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.parallel.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    stop = StopSignals()
    stop.retake()
    stop.install()
    signal.signal(signal.SIGTERM, lambda *_: None)
    stop.retake()
    os.kill(os.getpid(), signal.SIGTERM)
    return stop.requested


def test_handlers_that_another_library_replaced_are_installed_again() -> None:
    assert run_ranks(_another_handler, 1) == [True]


def _interrupted(rank: int, world_size: int, times: int) -> bool:
    """Ctrl-C `times` times while the main thread waits, where Python's handlers do not run."""
    import threading

    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.parallel.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    stop = StopSignals()
    stop.install()
    for number in range(times):
        threading.Timer(0.1 + 0.2 * number, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Event().wait(0.7)
    return stop.requested


@pytest.mark.slow
def test_ctrl_c_requests_a_stop_and_a_second_one_ends_the_process() -> None:
    assert run_ranks(_interrupted, 1, 1) == [True]
    with pytest.raises(AssertionError, match="exit code 130"):
        run_ranks(_interrupted, 1, 2)


def _ignoring(rank: int, world_size: int) -> list[bool]:
    """Signals that are ignored from the start, as by nohup, stay ignored; a batch system's warning does not."""
    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.parallel.signals import StopSignals

    initialize(ParallelConfig(), seed=1)
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    stop = StopSignals()
    stop.install()
    taken = [signal.getsignal(number) != signal.SIG_IGN for number in numbers]
    stop.uninstall()
    return taken


def test_ignored_signals_stay_ignored() -> None:
    assert run_ranks(_ignoring, 1) == [[False, False, True]]


_EARLY = """
import os, signal, sys, threading
from nemo_popsd.runtime.early_signals import ended_by_signals

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
with ended_by_signals():
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_before_the_first_step_a_signal_prints_one_line_and_requests_a_restart(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _EARLY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output = process.stderr.read()
        assert process.wait(10) == SAVED_AND_STOPPED
    assert output.startswith(f"popsd: stopped by {number.name}; no step was in progress")
    assert output.count("\n") == 1
