"""Actions on single ranks whose failures raise on all ranks, so that no rank waits for a failed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from nemo_popsd.errors import TransientError, UserError, describe_error, system_error, user_or_transient

_CATEGORIES = ("defect", "user", "transient")
"""In order of precedence."""
T = TypeVar("T")


def raise_on_all_ranks(what: str, action: Callable[[], None], *, need: str, fix: str) -> None:
    """Call `action`, which must not use collectives, and raise on every rank if it raised on any rank.

    Collective over the world: one gather of objects.

    Args:
        what: subject of the message.
        action: called on this rank.
        need: text for the message of an operating system error.
        fix: text for the message of an operating system error.

    Raises:
        UserError: a rank raised it, or had an operating system error that the user can fix (no space, no permission).
        TransientError: a rank raised it, or had a transient operating system error.
        RuntimeError: a rank raised any other error, which is the cause on that rank.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as raised:
        error = raised
    failures: list[tuple[str, Exception | str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if error is None else _categorized(error, what, need=need, fix=fix))
    failed = [(rank, *entry) for rank, entry in enumerate(failures) if entry is not None]
    if not failed:
        return
    rank, _, content = min(failed, key=lambda entry: _CATEGORIES.index(entry[1]))
    if isinstance(content, str):  # of a defect
        raise RuntimeError(f"{what}: {content} (rank {rank})") from error
    raise content from error


def from_rank_zero(what: str, action: Callable[[], T], *, need: str, fix: str) -> T:
    """Call `action` on rank 0 and return its result on every rank.

    Collective over the world: a gather and a broadcast of objects.

    Args:
        what: subject of the message.
        action: called on rank 0; must not use collectives.
        need: text for the message of an operating system error.
        fix: text for the message of an operating system error.

    Raises:
        UserError, TransientError, RuntimeError: on every rank, as `raise_on_all_ranks`.
    """
    box: list[T | None] = [None]

    def act() -> None:
        if dist.get_rank() == 0:
            box[0] = action()

    raise_on_all_ranks(what, act, need=need, fix=fix)
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def _categorized(error: Exception, what: str, *, need: str, fix: str) -> tuple[str, Exception | str]:
    """Return the category of an error and the error itself, or its description if it is a defect."""
    if isinstance(error, OSError):
        reported: Exception = system_error(what, error, need=need, fix=fix, where=f"(rank {dist.get_rank()})")
    else:
        reported = user_or_transient(error) if isinstance(error, UserError) else error
    if isinstance(reported, UserError):
        return "user", reported
    return ("transient", reported) if isinstance(reported, TransientError) else ("defect", describe_error(error))
