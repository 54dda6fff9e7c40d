"""Which process it is: told to other processes of the same machine, of others, and of the same batch job."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds, or asks for, something that one process at a time may have."""

    token: str = ""
    """Random; two processes never have the same."""
    host: str = ""
    """Name, for people; two machines may share one."""
    machine: str = ""
    """Start of the machine and its name space of processes: where process numbers mean the same."""
    pid: int = 0
    """Process number."""
    begun: int = 0
    """When the process began, in ticks of the machine: process numbers are used again."""
    job: str = ""
    """Batch job, with its cluster; empty outside of one."""
    start: int = 0
    """How often the batch system has started that job again."""
    since: str = ""
    """When it took hold, by its own clock, for people."""

    @classmethod
    def read(cls, path: Path) -> Holder:
        """What a process wrote; what cannot be understood counts as a process somewhere else.

        Raises:
            FileNotFoundError: nothing is there.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known: dict[str, Any] = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            for name in ("pid", "begun", "start"):
                known[name] = int(known.get(name, 0))
            return cls(**known)
        except (ValueError, TypeError):
            return cls(token=f"unreadable-{path.name}", host="unknown")

    def on_this_machine(self) -> bool:
        """Whether this process can see it."""
        return bool(self.machine) and self.machine == _machine()

    def ended(self) -> bool:
        """Whether it is known to have ended: on this machine, where no process has its number and its begin."""
        return self.on_this_machine() and self.begun != 0 and _begun(self.pid) != self.begun

    def follows(self, other: Holder) -> bool:
        """Whether it is a later start of the same batch job."""
        return bool(self.job) and self.job == other.job and self.start > other.start

    def precedes(self, other: Holder) -> bool:
        """Whether it is an earlier start of the same batch job."""
        return other.follows(self)

    def describe(self) -> str:
        """In words."""
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
        begun=_begun(os.getpid()) or 0,
        job=f"{job} on {cluster}" if job and cluster else job,
        start=int(restarts) if restarts.isdigit() else 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _machine() -> str:
    """Empty where the system does not say, so that nobody is taken for a neighbour."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _begun(pid: int) -> int | None:
    """When a living process began; None if there is none, or only its remains."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
