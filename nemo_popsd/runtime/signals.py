"""SIGTERM and SIGUSR1 ask a run to save and stop; all ranks agree on the moment, whichever of them got the signal.

A signal sets a flag of the process and a key of the process group's store: from a thread, since the main one may be
waiting inside a collective for minutes. The ranks look at it together, at the boundaries of steps (one all-reduce) and
while they decode (one broadcast over the ranks of a model every few tokens).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.distributed_c10d import _get_default_store

from nemo_popsd.errors import StopRequested
from nemo_popsd.runtime.distributed import device, on_any_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_KEY = "nemo_popsd/stop"
_TOKENS_BETWEEN_LOOKS = 16


class StopSignals:
    """Whether the run was asked to stop. One for a process; the process groups must exist."""

    def __init__(self) -> None:
        self._requested = False
        self._looks = 0
        self._previous: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def install(self) -> None:
        """Takes the signals over. Main thread only."""
        assert self._sockets is None
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = ours, theirs
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), name="stop signals", daemon=True).start()
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def retake(self) -> None:
        """Takes them over again from whoever has taken them since `install`; before that it does nothing."""
        if self._sockets is not None:
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Gives the signals back."""
        if self._sockets is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
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
        store whether any rank of the world was asked to stop.
        """
        self._looks += 1
        if self._looks % _TOKENS_BETWEEN_LOOKS:
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
        with ours:
            while received := ours.recv(64):
                if any(byte in SIGNALS for byte in received):
                    self._requested = True
                    _get_default_store().set(_KEY, str(os.getpid()))
