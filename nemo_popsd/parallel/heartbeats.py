"""Heartbeats to the launcher of nvidia-resiliency-ext, which restarts all ranks if one makes no progress.

`ft_launcher` starts ranks like torchrun, with a monitor per rank. With other launchers, nothing is sent.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from nemo_popsd.errors import UserError, describe_error

_MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
"""Environment variable with the socket of this rank's monitor."""
_SECONDS_BETWEEN = 1.0


class _Client(Protocol):
    """The used methods of nvidia-resiliency-ext's client."""

    def init_workload_monitoring(self) -> None: ...

    def send_heartbeat(self) -> None: ...


class Heartbeats:
    """The connection of this rank to its monitor."""

    def __init__(self) -> None:
        """Connect to the monitor, if there is one.

        Raises:
            UserError: there is a monitor, but nvidia-resiliency-ext cannot be imported.
        """
        self._client = _connected() if _MONITOR in os.environ else None
        self._sent = float("-inf")

    def send(self) -> None:
        """Report progress, at most once per second. No collectives."""
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
            got=f"{_MONITOR}, set by ft_launcher, in an environment where nvidia-resiliency-ext cannot be imported "
            f"({describe_error(error)})",
            need="the same environment for launcher and ranks",
            fix="install nvidia-resiliency-ext there, or start with torchrun",
        ) from error
    client: _Client = RankMonitorClient()
    client.init_workload_monitoring()
    return client
