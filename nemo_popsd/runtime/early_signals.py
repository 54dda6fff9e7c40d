"""Handles signals while a run starts or ends: prints one line, and exits with the status that requests a restart.

No step is in progress then. Does not import torch, so that it works before the slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from nemo_popsd.errors import SAVED_AND_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that stop a run: termination by a batch system, its warning before a time limit, Ctrl-C, closed terminal."""
before_leaving: list[Callable[[int, str], object]] = []
"""Functions that `leave` calls with the exit status and the printed line."""
_KEPT_IF_IGNORED = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the process with one line on a signal; `StopSignals` replaces these handlers once there is a run to save.

    Signals that are already ignored (nohup, a background job) stay ignored. Does nothing outside the main thread, where
    Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # A thread is needed, because Python's handlers do not run while the main thread waits for other processes.
    threading.Thread(target=_end, args=(reader,), name="early signals", daemon=True).start()
    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handled = [n for n in SIGNALS if not (n in _KEPT_IF_IGNORED and signal.getsignal(n) == signal.SIG_IGN)]
    previous = {number: signal.signal(number, _do_nothing) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(previous_descriptor)
        writer.close()  # ends the thread


def leave(status: int, text: str) -> NoReturn:
    """End the process at once, from any thread, after printing a line and calling the functions in `before_leaving`."""
    print_to_stderr(text)
    for call in before_leaving:
        with contextlib.suppress(Exception):
            call(status, text)
    os._exit(status)


def print_to_stderr(text: str) -> None:
    """Print a line to stderr, if it is open."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing. Python writes a signal to the wake-up socket, which the thread reads, only if it has a handler."""


def _end(reader: socket.socket) -> None:
    with reader:
        for byte in reader.recv(64):
            if byte in SIGNALS:
                name = signal.Signals(byte).name
                text = f"popsd: stopped by {name}; no step was in progress; what has been saved is unchanged"
                leave(SAVED_AND_STOPPED, text)
