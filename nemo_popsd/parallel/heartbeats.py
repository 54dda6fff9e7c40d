"""Tells the launcher of nvidia-resiliency-ext that this rank makes progress; it restarts all ranks when one does not.

`ft_launcher` starts ranks as torchrun does, with a monitor for each of them. Started otherwise, nothing is sent.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from nemo_popsd.errors import UserError, describe_error

_MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
"""Variable with the socket of this rank's monitor."""
_SECONDS_BETWEEN = 1.0


class _Client(Protocol):
    """What is used of nvidia-resiliency-ext's client."""

    def init_workload_monitoring(self) -> None: ...

    def send_heartbeat(self) -> None: ...


class Heartbeats:
    """The connection of this rank to its monitor."""

    def __init__(self) -> None:
        """Connects to the monitor, if there is one.

        Raises:
            UserError: there is one, and nvidia-resiliency-ext does not import.
        """
        self._client = _connected() if _MONITOR in os.environ else None
        self._sent = float("-inf")

    def send(self) -> None:
        """Reports progress, at most once a second. No collectives."""
        now = time.monotonic()
        if self._client is not None and now - self._sent >= _SECONDS_BETWEEN:
            self._client.send_heartbeat()
            self._sent = now


def _connected() -> _Client:
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise UserError(
            "launcher",
            got=f"{_MONITOR}, of ft_launcher, in an environment whose nvidia-resiliency-ext does not import "
            f"({describe_error(error)})",
            need="the same environment for launcher and ranks",
            fix="install nvidia-resiliency-ext there, or start with torchrun",
        ) from error
    client: _Client = RankMonitorClient()
    client.init_workload_monitoring()
    return client
