"""Signals to a run that is starting or ending, when no step is in progress: one line, and the exit status that asks for
the same command again. Imports no torch, so that it is there before anything slow.
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
"""What asks a run to stop: a batch system, its warning before a time limit, Ctrl-C, a terminal that is closed."""
_LEFT_IF_IGNORED = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, a signal ends the process with one line, wherever it is; `StopSignals` takes the signals over while there
    is something to save. What the process was told to ignore (nohup, a job in the background) stays ignored.

    Outside the main thread, where Python takes no signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    # A thread, since the main one may be waiting for other processes where Python's own handlers do not run.
    threading.Thread(target=_end, args=(ours,), name="early signals", daemon=True).start()
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    taken = [n for n in SIGNALS if not (n in _LEFT_IF_IGNORED and signal.getsignal(n) == signal.SIG_IGN)]
    previous = {number: signal.signal(number, _nothing) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(woken)
        theirs.close()  # ends the thread


def say(text: str) -> None:
    """Prints a line to stderr, if anything is there to take it."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread does it; a handler of Python's must be there, so that the thread hears of the signal."""


def _end(ours: socket.socket) -> None:
    with ours:
        for byte in ours.recv(64):
            if byte in SIGNALS:
                name = signal.Signals(byte).name
                say(f"popsd: stopped by {name}; no step was in progress; what has been saved is unchanged")
                os._exit(SAVED_AND_STOPPED)
