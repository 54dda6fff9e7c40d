"""Signals that ask a run to save and stop; all ranks agree on the moment, whichever of them got the signal.

SIGTERM and SIGUSR1 come from a batch system, SIGINT from Ctrl-C, SIGHUP from a terminal that is closed. A second SIGINT
ends the process at once.

A signal sets a flag of the process and a key of the process group's store: from a thread, since the main one may be
waiting inside a collective for minutes. The ranks look at it together, at the boundaries of steps (one all-reduce) and
while they decode (one broadcast over the ranks of a model every few tokens).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.distributed_c10d import _get_default_store

from nemo_popsd.errors import StopRequested
from nemo_popsd.parallel.distributed import device, on_any_rank
from nemo_popsd.runtime.early_signals import SIGNALS, say

_LEFT_IF_IGNORED = (signal.SIGINT, signal.SIGHUP)  # SIGUSR1 is ignored by slurm/rank.sh until it is taken over
_INTERRUPTED = 128 + signal.SIGINT
_KEY = "nemo_popsd/stop"
_TOKENS_BETWEEN_LOOKS = 16


class StopSignals:
    """Whether the run was asked to stop. One for a process; the process groups must exist."""

    def __init__(self) -> None:
        self._requested = False
        self._looks = 0
        self._previous: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._woken_before = -1
        self._terminals: list[int] = []

    def install(self) -> None:
        """Takes the signals over, SIGINT and SIGHUP only where they are not ignored. Main thread only."""
        assert self._sockets is None
        self._terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = ours, theirs
        self._woken_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), name="stop signals", daemon=True).start()
        taken = [n for n in SIGNALS if not (n in _LEFT_IF_IGNORED and signal.getsignal(n) == signal.SIG_IGN)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in taken}

    def retake(self) -> None:
        """Takes them over again from whoever has taken them since `install`; before that it does nothing."""
        if self._sockets is not None:
            for number in self._previous:
                signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Gives the signals back."""
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
        """Whether this rank knows of a request; the others may not yet."""
        return self._requested

    def request(self) -> None:
        """What a signal does."""
        self._requested = True

    def raise_if_requested(self) -> None:
        """Raises on every rank if any was asked to stop. Collective over the world: one all-reduce of one number.

        Raises:
            StopRequested: on every rank alike.
        """
        if on_any_rank(self._requested):
            self._requested = True
            raise StopRequested

    def while_decoding(self) -> bool:
        """Whether to stop, the same on all ranks of this model; called once for each token they decode together.

        Looks every 16 tokens: one broadcast of one number over the ranks of the model, of which the first asks the
        store whether any rank of the world was asked to stop. Under context or expert parallelism, where ranks of
        several such groups meet while they decode, it does not look: there a signal waits for the rollouts.
        """
        self._looks += 1
        if self._looks % _TOKENS_BETWEEN_LOOKS or _models_meet():
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

    def _watch(self, ours: socket.socket) -> None:
        interrupts = 0
        with ours:
            while received := ours.recv(64):
                found = [byte for byte in received if byte in SIGNALS]
                if not found:
                    continue
                if signal.SIGHUP in found:
                    self._leave_terminal()
                interrupts += found.count(signal.SIGINT)
                if interrupts > 1:
                    say("popsd: ended at once by a second SIGINT; what has been saved is unchanged")
                    os._exit(_INTERRUPTED)
                if not self._requested or signal.SIGINT in found:
                    again = "; a second Ctrl-C ends it at once" if signal.SIGINT in found else ""
                    name = signal.Signals(found[0]).name
                    say(f"popsd: {name}: the run is saved after the last completed step and stops{again}")
                self._requested = True
                _get_default_store().set(_KEY, str(os.getpid()))

    def _leave_terminal(self) -> None:
        """What would be printed to a terminal that is closed has no reader, and must not be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _models_meet() -> bool:
    sizes = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    return max(sizes) > 1
