"""Signals that request a run to save and stop. All ranks stop at the same step, whichever rank received the signal.

SIGTERM and SIGUSR1 come from a batch system, SIGINT from Ctrl-C, SIGHUP from a closed terminal. A second SIGINT ends
the process at once.

A signal sets a flag of the process and a key in the process group's store. A thread does this, because the main thread
may wait inside a collective for minutes. The ranks check for a request together, between steps (one all-reduce) and
while decoding (one broadcast over the ranks of a model every few tokens).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.distributed_c10d import _get_default_store

from nemo_popsd.errors import StopRequested
from nemo_popsd.parallel.distributed import device, on_any_rank
from nemo_popsd.runtime.early_signals import SIGNALS, leave, print_to_stderr

_LEFT_IF_IGNORED = (signal.SIGINT, signal.SIGHUP)  # slurm/rank.sh ignores SIGUSR1 until `install`
_INTERRUPTED = 128 + signal.SIGINT
_KEY = "nemo_popsd/stop"
_TOKENS_BETWEEN_CHECKS = 16

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class StopSignals:
    """Handles requests to stop the run. One object per process; the process groups must exist."""

    def __init__(self, progress: Callable[[], None] = lambda: None) -> None:
        """Create the object without installing handlers.

        Args:
            progress: called whenever this rank checks for a request, which shows that it does not hang.
        """
        self._progress = progress
        self._requested = False
        self._decoded = 0
        self._previous: dict[int, _Handler] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._woken_before = -1
        self._terminals: list[int] = []

    def install(self) -> None:
        """Install the handlers; SIGINT and SIGHUP stay ignored if they were ignored. Main thread only."""
        assert self._sockets is None
        self._terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = reader, writer
        self._woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True).start()
        taken = [n for n in SIGNALS if not (n in _LEFT_IF_IGNORED and signal.getsignal(n) == signal.SIG_IGN)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in taken}

    def retake(self) -> None:
        """Install the handlers again, if another library has replaced them since `install`."""
        if self._sockets is not None:
            for number in self._previous:
                signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Restore the previous handlers."""
        if self._sockets is None:
            return
        signal.set_wakeup_fd(self._woken_before)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._sockets[1].close()  # ends the thread
        self._sockets = None

    @property
    def requested(self) -> bool:
        """Whether this rank received a request; other ranks may not have received it."""
        return self._requested

    def request(self) -> None:
        """Request a stop, like a signal."""
        self._requested = True

    def raise_if_requested(self) -> None:
        """Raise on every rank if any rank received a request. Collective over the world: one all-reduce of one number.

        Raises:
            StopRequested: a stop was requested; on every rank.
        """
        self._progress()
        if on_any_rank(self._requested):
            self._requested = True
            raise StopRequested

    def while_decoding(self) -> bool:
        """Whether to stop, equal on all ranks of this model; called once for each token that they decode together.

        Checks every 16 tokens: one broadcast of one number over the ranks of the model; the first of them looks up in
        the store whether any rank of the world received a request. Under context or expert parallelism, several such
        groups exchange data while decoding; then it does not check, and a stop waits for the end of the rollouts.
        """
        self._progress()
        self._decoded += 1
        if self._decoded % _TOKENS_BETWEEN_CHECKS or _groups_exchange_data():
            return False
        group = parallel_state.get_model_parallel_group()
        first = dist.get_global_rank(group, 0)
        flag = torch.zeros(1, dtype=torch.int32, device=device())
        if dist.get_rank() == first and (self._requested or _get_default_store().check([_KEY])):
            flag.fill_(1)
        if group.size() > 1:
            dist.broadcast(flag, src=first, group=group)
        return bool(flag.item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def _watch(self, reader: socket.socket) -> None:
        interrupts = 0
        with reader:
            while received := reader.recv(64):
                numbers = [byte for byte in received if byte in SIGNALS]
                if not numbers:
                    continue
                if signal.SIGHUP in numbers:
                    self._leave_terminal()
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1:
                    leave(_INTERRUPTED, "popsd: ended at once by a second SIGINT; what has been saved is unchanged")
                if not self._requested or signal.SIGINT in numbers:
                    again = "; a second Ctrl-C ends it at once" if signal.SIGINT in numbers else ""
                    name = signal.Signals(numbers[0]).name
                    print_to_stderr(f"popsd: {name}: the run is saved after the last completed step and stops{again}")
                self._requested = True
                _get_default_store().set(_KEY, str(os.getpid()))

    def _leave_terminal(self) -> None:
        """Redirect the output of a closed terminal to /dev/null, so that printing does not raise."""
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(null, descriptor)
        os.close(null)


def _groups_exchange_data() -> bool:
    sizes = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    return any(size > 1 for size in sizes)
