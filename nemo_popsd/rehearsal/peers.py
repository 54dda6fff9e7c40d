"""Lets a process be one rank of many without starting the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def one_rank(rank: int, world: int) -> Iterator[None]:
    """Context in which this process is rank `rank` of `world` in torch.distributed, so that Megatron's groups can be
    created.

    Collectives return at once. A gather returns copies of this rank's contribution; a sum returns this rank's summand.
    The default group and Megatron's groups must not exist before, and are destroyed on exit.
    """
    new_group = dist.new_group

    def silent(ranks: Any = None, *args: Any, **options: Any) -> Any:
        return new_group(ranks, *args, **{**options, "backend": "fake", "pg_options": None})

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with mock.patch.object(dist, "new_group", silent):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
