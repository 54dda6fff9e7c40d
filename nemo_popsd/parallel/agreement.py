"""Doing something on some ranks in a way that all ranks learn of a failure, and none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_popsd.errors import TransientError, UserError, describe_error, system_error, user_or_transient

_KINDS = ("defect", "user", "transient")
T = TypeVar("T")


def raise_on_all_ranks(what: str, action: Callable[[], None], *, need: str, fix: str) -> None:
    """Calls `action`, which must not use collectives, and raises on every rank if it raised on any.

    Collective over the world: one gather of objects.

    Args:
        what: for the message.
        action: what this rank does.
        need: for the message, if the system refused.
        fix: for the message.

    Raises:
        UserError: some rank raised it, or the operating system refused something there that the user can change (no
            space, no permission).
        TransientError: some rank raised it, or the operating system failed there in a way that may pass.
        RuntimeError: anything else was raised on some rank; on that rank it is the cause.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as raised:
        error = raised
    told: list[tuple[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else _kind(error, what, need=need, fix=fix))
    failed = [(rank, *entry) for rank, entry in enumerate(told) if entry is not None]
    if not failed:
        return
    # A defect is told before what the user must change, and that before what another start may fix.
    rank, kind, content = min(failed, key=lambda entry: _KINDS.index(entry[1]))
    if kind == "defect":
        raise RuntimeError(f"{what}: {content} (rank {rank})") from error
    raise content from error


def from_rank_zero(what: str, action: Callable[[], T], *, need: str, fix: str) -> T:
    """What `action` returns on rank 0, on every rank. Collective over the world: a gather and a broadcast of objects.

    Args:
        what: for the message.
        action: what rank 0 does; must not use collectives.
        need: for the message, if the system refused.
        fix: for the message.

    Raises:
        UserError, TransientError, RuntimeError: on every rank, as `raise_on_all_ranks`.
    """
    found: list[Any] = [None]

    def act() -> None:
        if dist.get_rank() == 0:
            found[0] = action()

    raise_on_all_ranks(what, act, need=need, fix=fix)
    dist.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


def _kind(error: Exception, what: str, *, need: str, fix: str) -> tuple[str, Any]:
    if isinstance(error, OSError):
        told: Exception = system_error(what, error, need=need, fix=fix, where=f"(rank {dist.get_rank()})")
    else:
        told = user_or_transient(error) if isinstance(error, UserError) else error
    if isinstance(told, UserError):
        return "user", told
    return ("transient", told) if isinstance(told, TransientError) else ("defect", describe_error(error))
