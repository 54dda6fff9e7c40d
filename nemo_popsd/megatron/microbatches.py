"""From contexts of unequal length to padded micro-batches within a token budget, and to their response positions.

Sequences are padded on the right. Attention is causal, so padding changes nothing before it and needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_popsd.data.alignment import append_response, response_positions


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
    """Sequences that go through the model together; b of them, padded to s tokens, with N response tokens in all."""

    rows: list[int]
    """Which sequences of the caller's list these are, in order."""
    response_lengths: list[int]
    """Response tokens of each row; they sum to N."""
    input_ids: Tensor
    """[b, s] int64."""
    position_ids: Tensor
    """[b, s] int64."""
    response_index: Tensor
    """[N] int64: where the states that predict the response tokens stand in hidden states [s, b, H] flattened to
    [s·b, H]; row by row, in response order."""

    padding: int
    """Tokens that are computed for nothing: b·s less the sequences' lengths."""


def group_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest member, holds at most `token_budget` tokens.

    Longest first; a sequence longer than the budget is a group of its own. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    return groups


def microbatches(sequences: Sequence[ContextSequence], token_budget: int, device: torch.device) -> list[MicroBatch]:
    """Pads and groups `sequences`, longest first, within `token_budget` padded tokens each."""
    groups = group_by_length([len(s) for s in sequences], token_budget)
    return [_pad(sequences, rows, device) for rows in groups]


def _pad(sequences: Sequence[ContextSequence], rows: list[int], device: torch.device) -> MicroBatch:
    chosen = [sequences[row] for row in rows]
    longest, size = max(map(len, chosen)), len(chosen)
    ids = torch.zeros(size, longest, dtype=torch.long)
    index: list[Tensor] = []
    for column, sequence in enumerate(chosen):
        ids[column, : len(sequence)] = torch.tensor(append_response(sequence.prompt, sequence.response))
        positions = torch.arange(longest)[response_positions(len(sequence.prompt), len(sequence.response))]
        index.append(positions * size + column)
    return MicroBatch(
        rows=rows,
        response_lengths=[len(s.response) for s in chosen],
        input_ids=ids.to(device),
        position_ids=torch.arange(longest, device=device).expand(size, -1),
        response_index=torch.cat(index).to(device),
        padding=size * longest - sum(map(len, chosen)),
    )
