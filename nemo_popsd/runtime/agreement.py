"""Doing something on some ranks in a way that all ranks learn of a failure, and none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from nemo_popsd.errors import UserError


def do_together(what: str, action: Callable[[], None], *, need: str, mend: str) -> None:
    """Calls `action`, which must not use collectives, and raises on every rank if it raised on any.

    Collective over the world: one gather of objects.

    Args:
        what: for the message.
        action: what this rank does.
        need: for the message, if the system refused.
        mend: for the message.

    Raises:
        UserError: the operating system refused something (no space, no permission) on some rank.
        RuntimeError: anything else was raised on some rank; on that rank it is the cause.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as raised:
        error = raised
    told: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    ours = (isinstance(error, OSError), _words(error)) if error is not None else None
    dist.all_gather_object(told, ours)
    failed = [(rank, *entry) for rank, entry in enumerate(told) if entry is not None]
    if not failed:
        return
    rank, _, words = failed[0]
    if all(entry[1] for entry in failed):
        raise UserError(what, got=f"{words} (rank {rank})", need=need, mend=mend) from error
    rank, _, words = next(entry for entry in failed if not entry[1])
    raise RuntimeError(f"{what}: {words} (rank {rank})") from error


def _words(error: Exception | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
