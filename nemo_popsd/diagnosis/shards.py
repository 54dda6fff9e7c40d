"""The k largest entries over a sharded vocabulary, and the entries of given ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.parallel.vocabulary import VocabShard


class Largest(NamedTuple):
    """The largest entries per token, in descending order; replicated over the group."""

    values: Tensor
    """Values [n, ..., k] in the dtype of the tensors."""
    ids: Tensor
    """Vocabulary ids [n, ..., k], int64."""


def largest_of_shards(tensors: Sequence[Tensor], count: int, shard: VocabShard) -> Largest:
    """The `count` largest entries of the last dimension of several tensors over the full vocabulary, exactly.

    Each rank sends its own `count` largest entries, which together contain the largest of the full vocabulary. One
    all-gather of [n, ..., count] pairs in float64, which represents ids exactly; none for one shard. The order of equal
    entries is undefined.

    Args:
        tensors: n tensors [..., v] with this rank's true entries; v may differ between ranks and may be 0.
        count: number of entries, at most the vocabulary size.
        shard: vocabulary entries of this rank.
    """
    own = min(count, tensors[0].shape[-1])
    best = [x.topk(own, dim=-1) for x in tensors]
    values = torch.stack([largest.values for largest in best])
    ids = torch.stack([largest.indices for largest in best]) + shard.offset
    if shard.ranks == 1:
        return Largest(values, ids)
    sent = values.new_full((*values.shape[:-1], count, 2), -torch.inf, dtype=torch.float64)
    sent[..., :own, 0] = values.double()
    sent[..., :own, 1] = ids.double()
    gathered = [torch.empty_like(sent) for _ in range(shard.ranks)]
    dist.all_gather(gathered, sent, group=shard.group)
    candidates = torch.cat(gathered, dim=-2)
    largest = candidates[..., 0].topk(count, dim=-1)
    return Largest(largest.values.to(values.dtype), candidates[..., 1].gather(-1, largest.indices).long())


def at_ids(entries: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """This rank's part of the entry `ids[n]` of each token n: the entry if this rank holds the id, otherwise 0.

    No collective. The sum over the group is the entry, provided that it is finite.

    Args:
        entries: this rank's true entries [N, v].
        ids: vocabulary ids [N].
        shard: vocabulary entries of this rank.
    """
    local = ids - shard.offset
    is_local = (local >= 0) & (local < entries.shape[-1])
    if entries.shape[-1] == 0:
        return entries.new_zeros(ids.shape)
    values = entries.gather(-1, local.clamp(0, entries.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return values.where(is_local, values.new_zeros(()))
