"""Builds micro-batches within a token budget from sequences of unequal length, with the positions of their responses.

There are two forms. *Padded*: sequences are stacked, each padded on the right to the longest. *Packed*: sequences are
concatenated along the sequence dimension, with their bounds. Attention is causal, so padding on the right does not
change earlier tokens and needs no mask; padding that the layout requires of a packed sequence is part of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_popsd.data.alignment import append_response, response_positions
from nemo_popsd.megatron.response_routing import UNSPLIT, Route, SequenceSplit, plan_route

FEWEST_TOKENS = 2
"""Minimum number of tokens in a forward. Transformer Engine refuses one token with one key-value head, because it
cannot determine the memory layout ("qkv memory layout is not supported")."""


@dataclass(frozen=True)
class ContextSequence:
    """One context followed by the response."""

    prompt: Sequence[int]
    """Token ids of the context, at least one."""
    response: Sequence[int]
    """Token ids of the rollout, possibly none."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that pass the model together; this rank owns N of their response tokens.

    [S, b] are the padded length and the number of sequences, or the total number of packed tokens and 1.
    """

    sequences: list[int]
    """Indices into the caller's list of sequences."""
    response_lengths: list[int]
    """Response tokens of each sequence that this rank owns (all of them without context parallelism); they sum to N."""
    response_ids: Tensor
    """[N] int64: the response tokens that this rank owns, by sequence."""
    input_ids: Tensor
    """[b, S/cp] int64."""
    position_ids: Tensor
    """[b, S/cp] int64: position in the sequence."""
    packed: PackedSeqParams | None
    """Bounds of packed sequences along all S tokens, None when padded."""
    host_bounds: Tensor | None
    """The same bounds on the host, [sequences + 1] int32; None when padded."""
    route: Route
    """From hidden states [S/(cp·sp), b, H] to those that predict the owned response tokens, by sequence, [N, H]."""
    shape: tuple[int, int]
    """(S, b)."""
    padding: int
    """Tokens of padding: S·b minus the lengths of the sequences."""


@dataclass(frozen=True)
class TokenCount:
    """Tokens that passed through a model."""

    real: int = 0
    """Tokens of sequences."""
    padding: int = 0
    """Tokens of padding."""
    saved: int = 0
    """Tokens of sequences that were not computed because another sequence has the same prefix."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> TokenCount:
        """The tokens of `batches`, over all ranks that share them."""
        padding = sum(batch.padding for batch in batches)
        return cls(sum(batch.shape[0] * batch.shape[1] for batch in batches) - padding, padding)

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.real + other.real, self.padding + other.padding, self.saved + other.saved)


def group_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups indices so that each group, padded to its longest member, holds at most `token_budget` tokens.

    Longest first; a sequence longer than the budget is its own group. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in _longest_first(lengths):
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    return groups


def pack_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups indices so that the lengths of each group sum to at most `token_budget`.

    First-fit decreasing; a sequence longer than the budget is its own group. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    space: list[int] = []
    for index in _longest_first(lengths):
        fitting = next((group for group, left in enumerate(space) if lengths[index] <= left), None)
        if fitting is None:
            groups.append([index])
            space.append(token_budget - lengths[index])
        else:
            groups[fitting].append(index)
            space[fitting] -= lengths[index]
    return groups


def microbatches(
    sequences: Sequence[ContextSequence],
    token_budget: int,
    device: torch.device,
    *,
    split: SequenceSplit = UNSPLIT,
    packed: bool = False,
    one_shape: bool = False,
    count_multiple: int = 1,
    at_least: int = 0,
) -> list[MicroBatch]:
    """Groups `sequences`, longest first, within `token_budget` tokens each, padding included.

    Args:
        sequences: sequences of this data-parallel rank; the same list on all ranks that share the model.
        token_budget: maximum S·b of a micro-batch; a single sequence may be longer.
        device: device of the tensors.
        split: how the model splits sequences over ranks.
        packed: concatenate sequences instead of padding them.
        one_shape: all micro-batches have the same S and b, as the interleaved pipeline schedule needs.
        count_multiple: empty micro-batches are added until their number is a multiple of this.
        at_least: minimum number of micro-batches. An empty one has no sequence and a few tokens of padding.
    """
    multiple = split.sequence_multiple if packed else split.total_multiple
    lengths = [_round_up(len(sequence), multiple) for sequence in sequences]
    if packed:
        groups = pack_by_length(lengths, token_budget)
    elif one_shape and lengths:
        width = max(1, token_budget // max(lengths))
        order = _longest_first(lengths)
        groups = [order[begin : begin + width] for begin in range(0, len(order), width)]
    else:
        groups = group_by_length(lengths, token_budget)
    count = _round_up(max(len(groups), at_least), count_multiple)
    groups += [[] for _ in range(count - len(groups))]
    shapes = [_shape([lengths[index] for index in group], split, packed=packed) for group in groups]
    if one_shape and shapes:
        widest = tuple(map(max, zip(*shapes, strict=True)))
        shapes = [(widest[0], widest[1])] * len(shapes)
    build = _pack if packed else _pad
    return [build(sequences, group, shape, split, device) for group, shape in zip(groups, shapes, strict=True)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _shape(lengths: list[int], split: SequenceSplit, *, packed: bool) -> tuple[int, int]:
    """(S, b) of a group whose lengths are already multiples as the split needs; an empty group is only padding."""
    if packed:
        return _round_up(max(FEWEST_TOKENS, sum(lengths)), split.total_multiple), 1
    return _round_up(max([FEWEST_TOKENS, *lengths]), split.total_multiple), max(1, len(lengths))


def _pad(
    sequences: Sequence[ContextSequence],
    indices: list[int],
    shape: tuple[int, int],
    split: SequenceSplit,
    device: torch.device,
) -> MicroBatch:
    length, width = shape
    ids = torch.zeros(width, length, dtype=torch.long)
    for column, index in enumerate(indices):
        ids[column, : len(sequences[index])] = torch.tensor(
            append_response(sequences[index].prompt, sequences[index].response)
        )
    places = split.held_places([length], split.context_rank)
    return _micro_batch(
        sequences,
        indices,
        input_ids=ids[:, places],
        position_ids=places.expand(width, -1),
        packed=None,
        host_bounds=None,
        shape=shape,
        lengths=[length],
        starts=[(0, column) for column in range(len(indices))],
        split=split,
        device=device,
    )


def _pack(
    sequences: Sequence[ContextSequence],
    indices: list[int],
    shape: tuple[int, int],
    split: SequenceSplit,
    device: torch.device,
) -> MicroBatch:
    lengths = [_round_up(len(sequences[index]), split.sequence_multiple) for index in indices] or [0]
    lengths[-1] += shape[0] - sum(lengths)
    ids = torch.zeros(1, shape[0], dtype=torch.long)
    starts = [(sum(lengths[:place]), 0) for place in range(len(indices))]
    for index, (begin, _) in zip(indices, starts, strict=True):
        tokens = append_response(sequences[index].prompt, sequences[index].response)
        ids[0, begin : begin + len(tokens)] = torch.tensor(tokens)
    positions = torch.cat([torch.arange(length) for length in lengths])
    places = split.held_places(lengths, split.context_rank)
    host_bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    bounds = host_bounds.to(device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return _micro_batch(
        sequences,
        indices,
        input_ids=ids[:, places],
        position_ids=positions[places][None],
        packed=packed,
        host_bounds=host_bounds,
        shape=shape,
        lengths=lengths,
        starts=starts,
        split=split,
        device=device,
    )


def _micro_batch(
    sequences: Sequence[ContextSequence],
    indices: list[int],
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    packed: PackedSeqParams | None,
    host_bounds: Tensor | None,
    shape: tuple[int, int],
    lengths: list[int],
    starts: list[tuple[int, int]],
    split: SequenceSplit,
    device: torch.device,
) -> MicroBatch:
    """A micro-batch of either form; `starts` has the (index along S, index along b) of each sequence's first token."""
    positions, columns, owners = ([torch.empty(0, dtype=torch.long)] for _ in range(3))
    owned_counts: list[int] = []
    owned_ids: list[int] = []
    for index, (begin, column) in zip(indices, starts, strict=True):
        prompt, response = sequences[index].prompt, sequences[index].response
        places = torch.arange(shape[0])[response_positions(len(prompt), len(response))]
        positions.append(begin + places)
        columns.append(torch.full_like(places, column))
        owners.append(split.owners(response))
        owned = response[split.owned(response)]
        owned_counts.append(len(owned))
        owned_ids.extend(owned)
    route = plan_route(split, lengths, shape[1], torch.cat(positions), torch.cat(columns), torch.cat(owners))
    return MicroBatch(
        sequences=indices,
        response_lengths=owned_counts,
        response_ids=torch.tensor(owned_ids, dtype=torch.long).to(device),
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        packed=packed,
        host_bounds=host_bounds,
        route=route.to(device),
        shape=shape,
        padding=shape[0] * shape[1] - sum(len(sequences[index]) for index in indices),
    )
