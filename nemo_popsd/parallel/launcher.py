"""Reads the environment variables of a launcher (torchrun, slurm/rank.sh). Does not import torch."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_popsd.errors import TransientError, UserError

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OF_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_WHAT = "launcher"
_SINGLE = f"for a single process `unset {' '.join(_OF_RANKS)}`"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One of the processes of a launch; without a launcher, the only process."""

    rank: int = 0
    """Rank of this process."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank among the processes of this machine: the index of its GPU."""
    address: str = ""
    """Host of the rendezvous; empty for a single process."""
    port: int = 0
    """Port of the rendezvous."""
    agent_listens: bool = False
    """Whether the launcher listens at this port, as torchrun does; otherwise rank 0 listens."""


def rank() -> int:
    """Rank of this process; 0 without a launcher, and if RANK is not a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if _is_number(text) else 0


def world_size() -> int:
    """Number of processes, from WORLD_SIZE only.

    Raises:
        UserError: WORLD_SIZE is not a positive number.
    """
    return _number(os.environ, "WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1


def restarts() -> int:
    """Number of times that torchrun or ft_launcher has restarted the ranks; 0 without a restart."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if _is_number(text) else 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read this process's position among the processes of the run from the launcher's variables.

    Raises:
        UserError: only some variables are set, one is not a number, or two contradict each other.
    """
    present = [name for name in _OF_RANKS if name in environment]
    if not present:
        return Launch()
    world = _number(environment, "WORLD_SIZE", least=1) if "WORLD_SIZE" in environment else 0
    needed = (*_OF_RANKS, *_OF_RENDEZVOUS) if world != 1 else _OF_RANKS
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            _WHAT,
            got=f"{_shown(environment, *present)} without {', '.join(missing)}",
            need=f"{', '.join((*_OF_RANKS, *_OF_RENDEZVOUS))} together, as torchrun sets them, or none of them",
            fix=f"start the command with torchrun, or {_SINGLE}",
        )
    own, local = (_number(environment, name, least=0) for name in ("RANK", "LOCAL_RANK"))
    for name, value, of in (("RANK", own, "WORLD_SIZE"), ("LOCAL_RANK", local, "LOCAL_WORLD_SIZE")):
        if of in environment and value >= _number(environment, of, least=1):
            raise UserError(
                _WHAT,
                got=_shown(environment, name, of),
                need=f"a {name} below {of}",
                fix=f"start the command with torchrun, or {_SINGLE}",
            )
    if world == 1:
        return Launch(local_rank=local)
    return Launch(
        rank=own,
        world_size=world,
        local_rank=local,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", least=1, most=65535),
        agent_listens=environment.get(_AGENT_STORE) == "True",
    )


def check_rendezvous(launch: Launch) -> None:
    """Refuse a rendezvous that cannot work: an unknown host, or a port of this machine that is in use.

    Raises:
        UserError: the host is unknown, or this user cannot listen on the port.
        TransientError: the port is in use, or the name service does not respond.
    """
    if launch.world_size == 1:
        return
    place = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
    try:
        socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            fix = "check the machine's name service, or set MASTER_ADDR to an address"
            raise TransientError(_WHAT, got=f"{place}: {error.strerror}", fix=fix) from None
        raise UserError(
            _WHAT,
            got=f"{place}, a host that is unknown on this machine ({error.strerror})",
            need="a name or an address of the host of rank 0 that every rank can reach",
            fix=f"set MASTER_ADDR, or {_SINGLE}",
        ) from None
    if launch.rank == 0 and not launch.agent_listens:
        _check_port(launch.port, place)


def _check_port(port: int, place: str) -> None:
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fix = f"set MASTER_PORT to a free port, or end the process that uses it; {_SINGLE}"
            raise TransientError(_WHAT, got=f"{place}: another process uses this port", fix=fix) from None
        raise UserError(
            _WHAT,
            got=f"{place}, on which rank 0 cannot listen ({error.strerror})",
            need="a port on which this user may listen",
            fix="set MASTER_PORT",
        ) from None


def _number(environment: Mapping[str, str], name: str, *, least: int, most: int | None = None) -> int:
    text = environment[name]
    if _is_number(text) and int(text) >= least and (most is None or int(text) <= most):
        return int(text)
    raise UserError(
        _WHAT,
        got=_shown(environment, name),
        need=f"an integer of at least {least}" + ("" if most is None else f" and at most {most}"),
        fix=f"start the command with torchrun, or {_SINGLE}",
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _shown(environment: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={environment.get(name, '')[:40]!r}" for name in names)
