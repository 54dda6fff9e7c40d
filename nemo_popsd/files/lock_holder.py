"""The identity of a process, as other processes of the same machine, other machines or the same batch job read it."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds or requests a lock."""

    token: str = ""
    """Random and unique."""
    host: str = ""
    """Host name, for messages; not unique."""
    machine: str = ""
    """Boot ID and PID namespace of the machine, within which `pid` is valid."""
    pid: int = 0
    """Process ID."""
    start_time: int = 0
    """Start time of the process in clock ticks since boot, since process IDs are reused."""
    job: str = ""
    """Batch job and its cluster; empty outside of one."""
    start: int = 0
    """How often the batch system has restarted the job."""
    since: str = ""
    """When the process took the lock, by its own clock, for messages."""

    @classmethod
    def read(cls, path: Path) -> Holder:
        """Reads what a process wrote; unreadable content counts as a process on another machine.

        Raises:
            FileNotFoundError: `path` does not exist.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        holder = cls.of(content)
        return holder if holder.token else replace(holder, token=f"unreadable-{path.name}")

    @classmethod
    def of(cls, content: Any) -> Holder:
        """The process that an object of a file describes; anything else counts as a process on another machine."""
        try:
            known: dict[str, Any] = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            for name in ("pid", "start_time", "start"):
                known[name] = int(known.get(name, 0))
            return cls(**known)
        except (ValueError, TypeError):
            return cls(host="unknown")

    def on_this_machine(self) -> bool:
        """Whether it runs on the machine and in the PID namespace of the calling process."""
        return bool(self.machine) and self.machine == _machine()

    def ended(self) -> bool:
        """Whether it is known to have ended: on this machine, no process has its ID and its start time.

        A holder that did not record its start time has ended if no process has its ID.
        """
        if not self.on_this_machine():
            return False
        found = _start_time(self.pid)
        return found is None or self.start_time not in (0, found)

    def follows(self, other: Holder) -> bool:
        """Whether this is a later start of the batch job of `other`."""
        return bool(self.job) and self.job == other.job and self.start > other.start

    def precedes(self, other: Holder) -> bool:
        """Whether this is an earlier start of the batch job of `other`."""
        return other.follows(self)

    def describe(self) -> str:
        """The process in one phrase, for messages."""
        job = f", job {self.job}, start {self.start}" if self.job else ""
        return f"host {self.host}, process {self.pid}{job}, since {self.since or 'an unknown time'}"


def this_process() -> Holder:
    """The calling process, without a token."""
    environment = os.environ
    cluster, job = environment.get("SLURM_CLUSTER_NAME", ""), environment.get("SLURM_JOB_ID", "")
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        start_time=_start_time(os.getpid()) or 0,
        job=f"{job} on {cluster}" if job and cluster else job,
        start=int(restarts) if restarts.isdigit() else 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _machine() -> str:
    """Boot ID and PID namespace; empty if the system does not give them, and then no process counts as local."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None for a missing process or a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
