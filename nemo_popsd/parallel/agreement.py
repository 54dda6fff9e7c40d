"""Actions on single ranks whose failure raises on all ranks, so that no rank waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from nemo_popsd.errors import TransientError, UserError, describe_error, system_error, user_or_transient

_CATEGORIES = ("defect", "user", "transient")
"""Categories of errors in the order in which they are raised."""
T = TypeVar("T")


def raise_on_all_ranks(what: str, action: Callable[[], None], *, need: str, fix: str) -> None:
    """Calls `action`, which must not use collectives, and raises on every rank if it raised on any.

    Collective over the world: one gather of objects.

    Args:
        what: for the message.
        action: run on this rank.
        need: for the message of an error of the operating system.
        fix: for the message.

    Raises:
        UserError: some rank raised it, or had an error of the operating system that the user can fix (no space, no
            permission).
        TransientError: some rank raised it, or had an error of the operating system that may pass.
        RuntimeError: some rank raised anything else; on that rank it is the cause.
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
    """The result of `action` on rank 0, on every rank. Collective over the world: a gather and a broadcast of objects.

    Args:
        what: for the message.
        action: run on rank 0; must not use collectives.
        need: for the message of an error of the operating system.
        fix: for the message.

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
    """The category of an error and the error itself, or its description if it is a defect."""
    if isinstance(error, OSError):
        reported: Exception = system_error(what, error, need=need, fix=fix, where=f"(rank {dist.get_rank()})")
    else:
        reported = user_or_transient(error) if isinstance(error, UserError) else error
    if isinstance(reported, UserError):
        return "user", reported
    return ("transient", reported) if isinstance(reported, TransientError) else ("defect", describe_error(error))
