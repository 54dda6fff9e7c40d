"""Signals to a run that is starting or ending, when no step is in progress: one line, and the exit status that requests
a restart. Imports no torch, so that it is active before slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nemo_popsd.errors import SAVED_AND_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that stop a run: from a batch system, its warning before a time limit, Ctrl-C, a closed terminal."""
_LEFT_IF_IGNORED = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the block, a signal ends the process with one line. `StopSignals` takes the signals over while there is
    something to save. Signals that the process ignores (nohup, a background job) stay ignored.

    Does nothing outside the main thread, where Python does not handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # A thread: the main thread may wait for other processes in a call during which Python runs no signal handlers.
    threading.Thread(target=_end, args=(reader,), name="early signals", daemon=True).start()
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    taken = [n for n in SIGNALS if not (n in _LEFT_IF_IGNORED and signal.getsignal(n) == signal.SIG_IGN)]
    previous = {number: signal.signal(number, _nothing) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(previous_fd)
        writer.close()  # ends the thread


def say(text: str) -> None:
    """Prints a line to stderr, unless that is closed."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread ends the process. Python writes to the wake-up socket only if a handler is installed."""


def _end(reader: socket.socket) -> None:
    with reader:
        for byte in reader.recv(64):
            if byte in SIGNALS:
                name = signal.Signals(byte).name
                say(f"popsd: stopped by {name}; no step was in progress; what has been saved is unchanged")
                os._exit(SAVED_AND_STOPPED)
