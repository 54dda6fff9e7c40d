"""From contexts of unequal length to micro-batches within a token budget, and to their response positions.

Two forms. *Padded*: sequences side by side, each padded on the right to the longest. *Packed*: one after the other in
one row, with their bounds. Attention is causal, so padding on the right changes nothing before it and needs no mask;
a packed sequence's own padding, where the layout asks for any, belongs to the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_popsd.data.alignment import append_response, response_positions
from nemo_popsd.megatron.response_routing import WHOLE, Route, SequenceSplit, plan_route

FEWEST_TOKENS = 2
"""Of a forward: Transformer Engine does not know how one token with one key-value head lies in memory, and refuses it
("qkv memory layout is not supported")."""


@dataclass(frozen=True)
class ContextSequence:
    """One context: the ids of its prompt and of the response that continues it."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    response: Sequence[int]
    """Token ids of the rollout, possibly none."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, as this rank sees them; it owns N of their response tokens.

    S is the sequence dimension and b the other one: padded length and rows, or all packed tokens and 1.
    """

    rows: list[int]
    """Which sequences of the caller's list these are, in order."""
    response_lengths: list[int]
    """Response tokens of each row that this rank owns (all of them without context parallelism); they sum to N."""
    input_ids: Tensor
    """[b, S/cp] int64."""
    position_ids: Tensor
    """[b, S/cp] int64: place in the sequence."""
    packed: PackedSeqParams | None
    """Bounds of packed sequences in the whole row, None when padded."""
    host_bounds: Tensor | None
    """The same bounds on the host, [sequences + 1] int32; None when padded."""
    route: Route
    """From hidden states [S/(cp·sp), b, H] to those that predict the owned response tokens, row by row, [N, H]."""
    shape: tuple[int, int]
    """(S, b)."""
    padding: int
    """Tokens that are computed for nothing: S·b less the sequences' lengths."""


@dataclass(frozen=True)
class TokenCount:
    """What went through a model."""

    real: int = 0
    """Tokens of contexts."""
    padding: int = 0
    """Tokens that were computed for nothing."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> TokenCount:
        """That of `batches`, over all ranks that share them."""
        padding = sum(batch.padding for batch in batches)
        return cls(sum(batch.shape[0] * batch.shape[1] for batch in batches) - padding, padding)

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.real + other.real, self.padding + other.padding)


def group_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest member, holds at most `token_budget` tokens.

    Longest first; a sequence longer than the budget is a group of its own. Deterministic: ties keep their order.
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
    """Indices grouped so that the lengths of each group sum to at most `token_budget`.

    Longest first, each into the first group that has room; a sequence longer than the budget is a group of its own.
    Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        fitting = next((number for number, left in enumerate(room) if lengths[index] <= left), None)
        if fitting is None:
            groups.append([index])
            room.append(token_budget - lengths[index])
        else:
            groups[fitting].append(index)
            room[fitting] -= lengths[index]
    return groups


def microbatches(
    sequences: Sequence[ContextSequence],
    token_budget: int,
    device: torch.device,
    *,
    split: SequenceSplit = WHOLE,
    packed: bool = False,
    one_shape: bool = False,
    count_multiple: int = 1,
    at_least: int = 0,
) -> list[MicroBatch]:
    """Groups `sequences`, longest first, within `token_budget` tokens each, padding included.

    Args:
        sequences: of this data-parallel rank; the same list on all ranks that share the model.
        token_budget: S·b of a micro-batch, unless one sequence alone is longer.
        device: of the tensors.
        split: how the model spreads sequences over ranks.
        packed: one after the other instead of side by side.
        one_shape: all micro-batches have the same S and b, as the interleaved pipeline schedule needs.
        count_multiple: empty micro-batches are added until their number divides by this.
        at_least: and until there are as many as this. An empty one has no row and a few tokens of padding.
    """
    multiple = split.sequence_multiple if packed else split.total_multiple
    lengths = [_round_up(len(sequence), multiple) for sequence in sequences]
    if packed:
        groups = pack_by_length(lengths, token_budget)
    elif one_shape and lengths:
        rows = max(1, token_budget // max(lengths))
        order = _longest_first(lengths)
        groups = [order[begin : begin + rows] for begin in range(0, len(order), rows)]
    else:
        groups = group_by_length(lengths, token_budget)
    count = _round_up(max(len(groups), at_least), count_multiple)
    groups += [[] for _ in range(count - len(groups))]
    shapes = [_shape([lengths[row] for row in group], split, packed=packed) for group in groups]
    if one_shape and shapes:
        widest = tuple(map(max, zip(*shapes, strict=True)))
        shapes = [(widest[0], widest[1])] * len(shapes)
    build = _pack if packed else _pad
    return [build(sequences, group, shape, split, device) for group, shape in zip(groups, shapes, strict=True)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _shape(lengths: list[int], split: SequenceSplit, *, packed: bool) -> tuple[int, int]:
    """(S, b) of a group with these lengths, which divide as the split asks of each; an empty group is padding alone."""
    if packed:
        return _round_up(max(FEWEST_TOKENS, sum(lengths)), split.total_multiple), 1
    return _round_up(max([FEWEST_TOKENS, *lengths]), split.total_multiple), max(1, len(lengths))


def _pad(
    sequences: Sequence[ContextSequence],
    rows: list[int],
    shape: tuple[int, int],
    split: SequenceSplit,
    device: torch.device,
) -> MicroBatch:
    length, width = shape
    ids = torch.zeros(width, length, dtype=torch.long)
    for column, row in enumerate(rows):
        ids[column, : len(sequences[row])] = torch.tensor(
            append_response(sequences[row].prompt, sequences[row].response)
        )
    held = split.held([length], split.context_rank)
    return _micro_batch(
        sequences,
        rows,
        input_ids=ids[:, held],
        position_ids=held.expand(width, -1),
        packed=None,
        host_bounds=None,
        shape=shape,
        lengths=[length],
        starts=[(0, column) for column in range(len(rows))],
        split=split,
        device=device,
    )


def _pack(
    sequences: Sequence[ContextSequence],
    rows: list[int],
    shape: tuple[int, int],
    split: SequenceSplit,
    device: torch.device,
) -> MicroBatch:
    lengths = [_round_up(len(sequences[row]), split.sequence_multiple) for row in rows] or [0]
    lengths[-1] += shape[0] - sum(lengths)
    ids = torch.zeros(1, shape[0], dtype=torch.long)
    starts = [(sum(lengths[:number]), 0) for number in range(len(rows))]
    for row, (begin, _) in zip(rows, starts, strict=True):
        tokens = append_response(sequences[row].prompt, sequences[row].response)
        ids[0, begin : begin + len(tokens)] = torch.tensor(tokens)
    positions = torch.cat([torch.arange(length) for length in lengths])
    held = split.held(lengths, split.context_rank)
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
        rows,
        input_ids=ids[:, held],
        position_ids=positions[held][None],
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
    rows: list[int],
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
    """Both forms; `starts` are (place in the sequence dimension, column) of each row's first token."""
    positions, columns, owners = ([torch.empty(0, dtype=torch.long)] for _ in range(3))
    own: list[int] = []
    for row, (begin, column) in zip(rows, starts, strict=True):
        prompt, response = sequences[row].prompt, sequences[row].response
        places = torch.arange(shape[0])[response_positions(len(prompt), len(response))]
        positions.append(begin + places)
        columns.append(torch.full_like(places, column))
        owners.append(split.owners(response))
        own.append(len(response[split.owned(response)]))
    route = plan_route(split, lengths, shape[1], torch.cat(positions), torch.cat(columns), torch.cat(owners))
    return MicroBatch(
        rows=rows,
        response_lengths=own,
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        packed=packed,
        host_bounds=host_bounds,
        route=route.to(device),
        shape=shape,
        padding=shape[0] * shape[1] - sum(len(sequences[row]) for row in rows),
    )
