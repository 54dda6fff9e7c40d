"""Micro-batches of packed sequences, computed from lengths alone, with the padding of the layout.

Equal to those that `nemo_popsd.megatron.microbatches` builds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.planning.layout import Layout

_FEWEST_TOKENS = 2


@dataclass(frozen=True)
class Packed:
    """One micro-batch of concatenated sequences."""

    lengths: tuple[int, ...]
    """Length of each sequence including padding; they sum to S."""
    responses: tuple[tuple[int, int], ...]
    """For each sequence: the first position along S that predicts a response token, and the number of such
    positions."""

    @property
    def tokens(self) -> int:
        """S, padding included."""
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        """Sum of the squares of the lengths, padding included."""
        return sum(length**2 for length in self.lengths)

    def gathered_rows(self, layout: Layout, context_rank: int) -> int:
        """Rows of the all-gather of response states over the slices of sequence parallelism: each slice contributes as
        many as the one with the most.
        """
        slices = layout.tensor if layout.sequence else 1
        size = self.tokens // layout.context // slices
        spans = self._held(layout, context_rank)
        held = [
            sum(max(0, min(end, (part + 1) * size) - max(begin, part * size)) for begin, end in spans)
            for part in range(slices)
        ]
        return slices * max(held)

    def held_rows(self, layout: Layout, context_rank: int) -> int:
        """States of response tokens that a context-parallel rank computes."""
        return sum(end - begin for begin, end in self._held(layout, context_rank))

    def owned_rows(self, layout: Layout, context_rank: int) -> int:
        """Number of response tokens whose loss a context-parallel rank computes, assuming that all token ids are 1."""
        return sum(len(_owned(count, layout, context_rank)) for _, count in self.responses)

    def diagnosed_rows(self, layout: Layout, context_rank: int, diagnosed: int, rows: int, first: int) -> int:
        """Number of owned tokens that are diagnosed: diagnosed tokens are evenly spaced over `rows` equal responses,
        and this micro-batch starts at response `first`.
        """
        each = self.responses[0][1]
        total = rows * each
        chosen = {number * total // min(diagnosed, total) for number in range(min(diagnosed, total))}
        return sum(
            row * each + token in chosen
            for row in range(first, first + len(self.responses))
            for token in _owned(each, layout, context_rank)
        )

    def _held(self, layout: Layout, context_rank: int) -> list[tuple[int, int]]:
        """Ranges (begin, end) of a context-parallel rank's tokens that predict response tokens. The rank holds the
        chunks `context_rank` and 2·c − 1 − `context_rank` of 2·c equal chunks of each sequence.
        """
        if layout.context == 1:
            return [(begin, begin + count) for begin, count in self.responses]
        found, place, start = [], 0, 0
        spans = [*self.responses, *[(0, 0)] * (len(self.lengths) - len(self.responses))]
        for length, (begin, count) in zip(self.lengths, spans, strict=True):
            chunk = length // (2 * layout.context)
            for index in (context_rank, 2 * layout.context - 1 - context_rank):
                first = start + index * chunk
                low, high = max(begin, first), min(begin + count, first + chunk)
                if low < high:
                    found.append((place + low - first, place + high - first))
                place += chunk
            start += length
        return found


def _owned(count: int, layout: Layout, context_rank: int) -> range:
    """The tokens that a context-parallel rank owns in a response of `count` tokens with id 1."""
    return range((context_rank - count) % layout.context, count, layout.context)


def packed(sequences: Sequence[tuple[int, int]], budget: int, layout: Layout) -> list[Packed]:
    """Micro-batches of at most `budget` tokens by first-fit-decreasing packing.

    Args:
        sequences: length and number of response tokens of each sequence.
        budget: tokens of one micro-batch; a single sequence may be longer.
        layout: determines the multiple to which lengths are padded; with virtual stages all micro-batches have the same
            shape, and their number is a multiple of the number of stages.
    """
    multiple = 2 * layout.context if layout.context > 1 else 1
    slices = layout.context * (layout.tensor if layout.sequence else 1)
    total_multiple = math.lcm(multiple, slices)
    groups: list[list[tuple[int, int]]] = []
    used: list[int] = []
    before, number = 0, 0
    for length, response in sorted(sequences, key=lambda sequence: -sequence[0]):
        padded = _round_up(length, multiple)
        # A group without space for a sequence has no space for another of the same length either.
        first = number if padded == before else 0
        number = next((n for n in range(first, len(used)) if padded + used[n] <= budget), len(used))
        before = padded
        if number == len(groups):
            groups.append([])
            used.append(0)
        groups[number].append((length, response))
        used[number] += padded
    interleaved = layout.virtual_pipeline > 1
    missing = _round_up(max(1, len(groups)), layout.pipeline if interleaved else 1) - len(groups)
    groups += [[] for _ in range(missing)]
    used += [0] * missing
    totals = [_round_up(max(_FEWEST_TOKENS, tokens), total_multiple) for tokens in used]
    if interleaved:
        totals = [max(totals)] * len(totals)
    return [_micro_batch(group, total, multiple) for group, total in zip(groups, totals, strict=True)]


def _micro_batch(group: list[tuple[int, int]], total: int, multiple: int) -> Packed:
    lengths = [_round_up(length, multiple) for length, _ in group] or [0]
    lengths[-1] += total - sum(lengths)
    begins = [sum(lengths[:place]) for place in range(len(group))]
    responses = [
        (begin + length - response - 1, response) for begin, (length, response) in zip(begins, group, strict=True)
    ]
    return Packed(tuple(lengths), tuple(responses))


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
