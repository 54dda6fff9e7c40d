"""Assigns tokens of a sequence to ranks and response tokens to owners, and moves states to their owners.

Context parallelism gives each rank two chunks of every sequence, and sequence parallelism gives it a slice of the
chunks of its context-parallel rank. The contexts of one response have different lengths, so the same response token is
on different ranks in each context. The loss needs the states of all branches of a token on one rank, so the owner of a
response token depends only on the response (`owned`). `gather_response_states` moves the states of response tokens, and
no others, from the ranks that computed them to their owners, with the exact adjoint in the backward.

Shapes: S length of the sequence dimension (padded length, or all tokens of a packed batch), b its other dimension (1
when packed), H hidden size, M response tokens that this context-parallel rank holds, N those that it owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_popsd.megatron.config import FP8_MULTIPLES
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.layers import zigzag_positions


@dataclass(frozen=True)
class SequenceSplit:
    """How a model splits the sequence dimension over ranks."""

    context: dist.ProcessGroup | None = None
    """The context-parallel group; None if it has one rank."""
    tensor: dist.ProcessGroup | None = None
    """The tensor-parallel group under sequence parallelism; otherwise None."""
    token_multiple: int = 1
    """The number of tokens on each rank must be a multiple of this."""

    @classmethod
    def of(cls, model: ModelChunk) -> SequenceSplit:
        """The current split of `model`, which depends on `nemo_popsd.megatron.fp8.in_fp8`."""
        groups, config = model.pg_collection, model.config
        return cls(
            context=groups.cp if config.context_parallel_size > 1 else None,
            tensor=groups.tp if config.sequence_parallel else None,
            token_multiple=FP8_MULTIPLES[config.fp8_recipe] if config.fp8 else 1,
        )

    @property
    def context_size(self) -> int:
        """Number of context-parallel ranks."""
        return 1 if self.context is None else self.context.size()

    @property
    def context_rank(self) -> int:
        """Index of this rank in the context-parallel group."""
        return 0 if self.context is None else self.context.rank()

    @property
    def tensor_size(self) -> int:
        """Number of slices of a context-parallel rank's tokens."""
        return 1 if self.tensor is None else self.tensor.size()

    @property
    def tensor_rank(self) -> int:
        """Index of this rank's slice."""
        return 0 if self.tensor is None else self.tensor.rank()

    @property
    def sequence_multiple(self) -> int:
        """The length of each sequence must be a multiple of this: two chunks for each context-parallel rank."""
        return 1 if self.context is None else 2 * self.context_size

    @property
    def total_multiple(self) -> int:
        """S must be a multiple of this: each rank's part must also divide into slices."""
        return math.lcm(self.sequence_multiple, self.context_size * self.tensor_size * self.token_multiple)

    def held_places(self, lengths: Sequence[int], rank: int) -> Tensor:
        """Indices along S of the tokens that context-parallel rank `rank` holds, in its order: [S/cp] int64.

        Args:
            lengths: lengths of the sequences that are concatenated along S; they sum to S.
            rank: context-parallel rank.
        """
        if self.context_size == 1:
            return torch.arange(sum(lengths))
        parts, begin = [], 0
        for length in lengths:
            local = length // self.context_size
            parts.append(begin + zigzag_positions(local, self.context_size, rank, torch.device("cpu")))
            begin += length
        return torch.cat(parts)

    def owners(self, response: Sequence[int]) -> Tensor:
        """The context-parallel rank that owns each token of `response`: [R] int64.

        Tokens are assigned to the ranks in turn, starting at a rank that depends on the token ids. The numbers of
        tokens of a response on two ranks differ by at most one, and responses of one token are distributed as well.
        """
        return (sum(response) + torch.arange(len(response))) % self.context_size

    def owned(self, response: Sequence[int]) -> slice:
        """The tokens of `response` that this rank owns; all tokens without context parallelism."""
        return slice((self.context_rank - sum(response)) % self.context_size, None, self.context_size)


UNSPLIT = SequenceSplit()
"""Each rank has full sequences."""


@dataclass(frozen=True)
class Route:
    """Maps the hidden states of this rank to the states of the response tokens that it owns, in their order."""

    take: Tensor
    """[n] int64: indices into this rank's states [S/(cp·sp)·b, H] of those that predict response tokens."""
    slice_counts: list[int]
    """Number of states from each slice (tensor-parallel rank); they sum to M."""
    send: Tensor
    """[M] int64: sorts the concatenated states of all slices by owner."""
    send_counts: list[int]
    """Number of states to send to each context-parallel rank."""
    receive: Tensor
    """[N] int64: sorts the received states, concatenated by holder, into the order of the owned tokens."""
    receive_counts: list[int]
    """Number of states to receive from each context-parallel rank; they sum to N."""

    def to(self, device: torch.device) -> Route:
        """The same route with its indices on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("take", "send", "receive")}
        return replace(self, **moved)


def plan_route(
    split: SequenceSplit, lengths: Sequence[int], width: int, positions: Tensor, columns: Tensor, owners: Tensor
) -> Route:
    """The route of the response tokens of one micro-batch; every rank computes it from the same arguments.

    Args:
        split: how sequences are split over ranks.
        lengths: see `SequenceSplit.held_places`.
        width: b.
        positions: indices along S that predict the response tokens, in the order of the tokens.
        columns: indices along b of the same tokens.
        owners: context-parallel ranks that own the tokens.
    """
    total = sum(lengths)
    holder, place = torch.empty(2, total, dtype=torch.long)
    for rank in range(split.context_size):
        held = split.held_places(lengths, rank)
        holder[held], place[held] = rank, torch.arange(len(held))
    slice_length = total // (split.context_size * split.tensor_size)
    at_slice = place[positions] // slice_length
    here = (holder[positions] == split.context_rank).nonzero().squeeze(1)
    own = here[at_slice[here] == split.tensor_rank]
    by_slice = at_slice[here].argsort(stable=True)
    by_owner = owners[here].argsort(stable=True)
    owned = (owners == split.context_rank).nonzero().squeeze(1)
    by_holder = holder[positions[owned]].argsort(stable=True)
    return Route(
        take=(place[positions[own]] - split.tensor_rank * slice_length) * width + columns[own],
        slice_counts=at_slice[here].bincount(minlength=split.tensor_size).tolist(),
        send=_inverse(by_slice)[by_owner],
        send_counts=owners[here].bincount(minlength=split.context_size).tolist(),
        receive=_inverse(by_holder),
        receive_counts=holder[positions[owned]].bincount(minlength=split.context_size).tolist(),
    )


def gather_response_states(hidden_SBH: Tensor, route: Route, split: SequenceSplit) -> Tensor:
    """The states [N, H] that predict the response tokens of this rank, from the ranks' hidden states.

    Collectives, with e bytes per number, in the forward and again in the backward unless stated: none without sequence
    and context parallelism; under sequence parallelism one all-gather of the states of response tokens on this context
    rank (tp · the largest slice's states · H · e received; none in the backward); under context parallelism one
    all-to-all (at most N · H · e received).

    The result is the same on all ranks of the tensor-parallel group, and its gradient must be the same and complete:
    `loss_from_hidden` sums it over the group. The backward of the gather therefore selects this rank's part without a
    sum; a sum would count each gradient once for every rank.

    Args:
        hidden_SBH: [S/(cp·sp), b, H].
        route: route of the micro-batch.
        split: the split for which the route was planned.
    """
    states = hidden_SBH.flatten(0, 1).index_select(0, route.take)
    if split.tensor is not None:
        gather: Callable[..., Tensor] = _GatherSlices.apply
        states = gather(states, route.slice_counts, split.tensor)
    if split.context is None:
        # No exchange: the order of the owner is the order of the tokens.
        return states if split.tensor is None else states.index_select(0, route.send)
    states = states.index_select(0, route.send)
    exchange: Callable[..., Tensor] = _Exchange.apply
    states = exchange(states, route.send_counts, route.receive_counts, split.context)
    return states.index_select(0, route.receive)


class _GatherContext(Protocol):
    begin: int
    count: int


class _GatherSlices(torch.autograd.Function):
    """States of all ranks, one rank after the other, on every rank; the backward takes this rank's, without a sum."""

    @staticmethod
    def forward(ctx: _GatherContext, states: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.begin = sum(counts[: group.rank()])
        ctx.count = counts[group.rank()]
        padded = states.new_zeros(max(counts), states.shape[1])
        padded[: len(states)] = states
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatherContext, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.begin : ctx.begin + ctx.count].contiguous(), None, None


class _ExchangeContext(Protocol):
    counts: tuple[list[int], list[int]]
    group: dist.ProcessGroup


class _Exchange(torch.autograd.Function):
    """All-to-all of states in blocks, one block for each rank; the backward sends the blocks back."""

    @staticmethod
    def forward(
        ctx: _ExchangeContext,
        states: Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.counts, ctx.group = (send_counts, receive_counts), group
        return _all_to_all(states, send_counts, receive_counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ExchangeContext, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        send_counts, receive_counts = ctx.counts
        return _all_to_all(gradients[0], receive_counts, send_counts, ctx.group), None, None, None


def _all_to_all(states: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    received = states.new_empty(sum(receive_counts), states.shape[1])
    dist.all_to_all_single(received, states.contiguous(), receive_counts, send_counts, group=group)
    return received


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse
