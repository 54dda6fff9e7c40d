"""The k largest entries of a vocabulary that lies in shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.parallel.collectives import group_rank, group_size


class Largest(NamedTuple):
    """The largest entries of each row, in falling order; replicated over the group."""

    values: Tensor
    """[n, ..., k] in the dtype of the rows."""
    ids: Tensor
    """[n, ..., k] int64, vocabulary ids."""


def largest_of_shards(
    tensors: Sequence[Tensor], count: int, *, width: int, tp_group: dist.ProcessGroup | None
) -> Largest:
    """The `count` largest entries of each row of several tensors over the whole vocabulary, exactly.

    Each rank offers its own `count` largest, among which the whole vocabulary's must be. One all-gather of
    [n, ..., count] pairs in float64, which holds ids exactly; none for one shard. Among equal entries the order is
    not defined.

    Args:
        tensors: n of [..., v] each, this rank's true entries; v may differ between ranks, and be 0.
        count: entries to find, at most the vocabulary.
        width: rows of the output matrix on each rank: entry i of rank r has id r·width + i.
        tp_group: the group over which the vocabulary is sharded; None for one shard.
    """
    own = min(count, tensors[0].shape[-1])
    best = [x.topk(own, dim=-1) for x in tensors]
    values = torch.stack([found.values for found in best])
    ids = torch.stack([found.indices for found in best]) + group_rank(tp_group) * width
    shards = group_size(tp_group)
    if shards == 1:
        return Largest(values, ids)
    offered = values.new_full((*values.shape[:-1], count, 2), -torch.inf, dtype=torch.float64)
    offered[..., :own, 0] = values.double()
    offered[..., :own, 1] = ids.double()
    gathered = [torch.empty_like(offered) for _ in range(shards)]
    dist.all_gather(gathered, offered, group=tp_group)
    everything = torch.cat(gathered, dim=-2)
    largest = everything[..., 0].topk(count, dim=-1)
    return Largest(largest.values.to(values.dtype), everything[..., 1].gather(-1, largest.indices).long())


def at_ids(rows: Tensor, ids: Tensor, *, width: int, tp_group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of the entries `ids` of each row: the value where it holds the id, else 0. No collective.

    The sum over the group is the entry, provided that it is finite.

    Args:
        rows: [N, v], this rank's true entries.
        ids: [N] vocabulary ids.
        width: as in `largest_of_shards`.
        tp_group: as there.
    """
    local = ids - group_rank(tp_group) * width
    mine = (local >= 0) & (local < rows.shape[-1])
    if rows.shape[-1] == 0:
        return rows.new_zeros(ids.shape)
    found = rows.gather(-1, local.clamp(0, rows.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return found.where(mine, found.new_zeros(()))
