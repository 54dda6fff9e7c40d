"""All collectives of the distillation losses, over the tensor-parallel group with the sharded vocabulary.

If the group is None or has one rank, this rank holds the full vocabulary and nothing is sent.

Under autograd, a raw `torch.distributed.all_reduce` gives the right loss and a wrong gradient, because autograd does
not record the operation. There are two correct adjoints; the consumer of the sum determines which one applies:

    `sum_for_shards`: each rank uses the sum for its own shard (a softmax denominator). The gradients of the sum differ
        between ranks, and each is a part of the total: backward is also an all-reduce.
    `sum_for_replicas`: every rank uses the sum in the same way (a loss). Every rank already has the full gradient:
        backward is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of vocabulary shards; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Index of this rank's vocabulary shard; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def reduce_max_(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Replace `x` by its maximum over the group. One all-reduce, without gradient: for constants only."""
    assert not x.requires_grad, "for constants only"
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def reduce_sum_(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Replace `x` by its sum over the group. One all-reduce, without gradient: for constants only."""
    assert not x.requires_grad, "for constants only"
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def gather_shards(
    parts: Sequence[Tensor], group: dist.ProcessGroup | None, meanwhile: Callable[[], None] | None = None
) -> list[Tensor]:
    """Gather `parts` from every rank of the group: [n, ...] to [P, n, ...] each. One all-gather, without gradient.

    The result is bit-equal on all ranks, and so are sums over the shards in rank order.

    Args:
        parts: tensors of one dtype, with the same shapes on every rank.
        group: the group of P ranks.
        meanwhile: work to run during the all-gather.
    """
    size = group_size(group)
    if size == 1:
        if meanwhile is not None:
            meanwhile()
        return [part.unsqueeze(0) for part in parts]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(size, sent.numel())
    work = dist.all_gather(list(received), sent, group=group, async_op=True)
    if meanwhile is not None:
        meanwhile()
    work.wait()
    shards = received.split([part.numel() for part in parts], dim=1)
    return [shard.reshape(size, *part.shape) for shard, part in zip(shards, parts, strict=True)]


def sum_shards_(x: Tensor, group: dist.ProcessGroup | None, meanwhile: Callable[[], None] | None = None) -> Tensor:
    """Like `reduce_sum_`, with work to run during the all-reduce."""
    assert not x.requires_grad, "for constants only"
    work = None
    if group_size(group) > 1:
        work = dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group, async_op=True)
    if meanwhile is not None:
        meanwhile()
    if work is not None:
        work.wait()
    return x


class _GroupContext(Protocol):
    group: dist.ProcessGroup | None


class _SumForShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GroupContext, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return reduce_sum_(x.detach().clone(), group)

    @staticmethod
    def backward(ctx: _GroupContext, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduce_sum_(gradients[0].detach().clone(), ctx.group), None


class _SumForReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return reduce_sum_(x.detach().clone(), group)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def sum_for_shards(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the group, differentiable, for use with sharded tensors: all-reduce forward, all-reduce backward."""
    apply: Callable[..., Tensor] = _SumForShards.apply
    return apply(x, group)


def sum_for_replicas(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the group, differentiable, for the same use on every rank: all-reduce forward, identity backward."""
    apply: Callable[..., Tensor] = _SumForReplicas.apply
    return apply(x, group)
