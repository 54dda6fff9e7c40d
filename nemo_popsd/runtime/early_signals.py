"""Handles signals while a run starts or ends and no step is in progress: prints one line, and exits with the status
that requests a restart.

Does not import torch, so that it works before the slow imports.
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
"""Signals that stop a run: of a batch system, its warning before a time limit, Ctrl-C, and a closed terminal."""
before_leaving: list[Callable[[int, str], object]] = []
"""Called by `leave` with the exit status and the line that it prints."""
_KEPT_IF_IGNORED = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context in which a signal ends the process with one line; `StopSignals` takes over once there is a run to save.

    Signals that the process ignores from the start (nohup, a background job) stay ignored. Does nothing outside the
    main thread, where Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # A thread, since the main one may be waiting for other processes where Python's own handlers do not run.
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
    """Ends the process at once, from any thread: prints a line and makes the calls that `before_leaving` has."""
    print_to_stderr(text)
    for call in before_leaving:
        with contextlib.suppress(Exception):
            call(status, text)
    os._exit(status)


def print_to_stderr(text: str) -> None:
    """Prints a line to stderr, if it is open."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing. Python writes a signal to the wake-up socket, which the thread reads, only if it has a handler."""


def _end(reader: socket.socket) -> None:
    with reader:
        for byte in reader.recv(64):
            if byte in SIGNALS:
                name = signal.Signals(byte).name
                text = f"popsd: stopped by {name}; no step was in progress; what has been saved is unchanged"
                leave(SAVED_AND_STOPPED, text)
