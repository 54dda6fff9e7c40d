"""Which row sits in which slot of the cache: rows enter as others leave. Plain Python; equal on all ranks.

Decisions follow from the requests and the drawn tokens alone, which all ranks of a model have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_popsd.rollout.engine import Request, SamplingParams

PREFILL_TOKENS = 8192
"""Most tokens of one prefill of several prompts: its activations, of a layer at a time, are small beside training's."""
_SHARES = 8
"""Rows enter once an eighth of the slots is free, and the computed width shrinks by eighths: each costs a forward, or
copies, beside the steps."""


@dataclass
class Row:
    """A request and what was drawn for it so far."""

    number: int
    """Index of the request."""
    request: Request
    response: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cut: bool = False
    """Whether it ended at the limit."""

    @property
    def position(self) -> int:
        """Of the token that the next step puts into the cache: the last of prompt and response so far."""
        return len(self.request.prompt) + len(self.response) - 1

    @property
    def last(self) -> int:
        """That token."""
        return self.response[-1] if self.response else self.request.prompt[-1]


@dataclass(frozen=True)
class Admission:
    """Rows that enter their slots."""

    rows: list[tuple[int, Row]]
    """Slot and row, of all of them."""
    prefills: list[list[tuple[int, Row]]]
    """Those whose prompts have to be computed, in the groups in which they are computed together."""
    copies: list[tuple[int, int, int]]
    """Source slot, target slot and number of tokens, after the prefills: prompts that the cache has already."""


class SlotSchedule:
    """Rows that wait, rows in their slots, rows that are done.

    The keys of a prompt are computed once for all rows that have it and are side by side in the queue: a slot keeps
    its row's prompt until another row takes it. The last token of a prompt is not prefilled: it is the first step's.

    Attributes:
        width: the first so many slots are computed in each step.
        slots: the row in each slot, or None.
    """

    def __init__(self, requests: Sequence[Request], slots: int, *, prefill_tokens: int) -> None:
        """Queues all requests, those with prompts of like length and with the same prompt side by side.

        Args:
            requests: prompts are not empty.
            slots: rows in the cache at one time.
            prefill_tokens: most tokens, padding included, of one prefill of several rows.
        """
        order = sorted(range(len(requests)), key=lambda n: (len(requests[n].prompt), list(requests[n].prompt)))
        self._waiting = [Row(number, requests[number]) for number in reversed(order)]
        self._prefill_tokens = prefill_tokens
        self.slots: list[Row | None] = [None] * slots
        self._held: list[tuple[int, ...] | None] = [None] * slots
        self.width = slots
        self.done: list[Row] = []

    @property
    def live(self) -> list[tuple[int, Row]]:
        """Slot and row of the rows that are being drawn."""
        return [(slot, row) for slot, row in enumerate(self.slots) if row is not None]

    @property
    def unfinished(self) -> bool:
        """Whether any row waits or is being drawn."""
        return bool(self._waiting) or any(row is not None for row in self.slots)

    @property
    def longest(self) -> int:
        """Positions that the next step's rows see at most."""
        return max(row.position for _, row in self.live) + 1

    def admit(self) -> Admission | None:
        """Lets waiting rows into free slots, once enough of them are free; None where none enters."""
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        enough = max(1, len(self.slots) // _SHARES)
        if not self._waiting or len(free) < min(enough, len(self._waiting)):
            return None
        rows, prefills, copies = [], [], []
        while free and self._waiting:
            row = self._waiting.pop()
            prompt = tuple(row.request.prompt)
            source = self._held.index(prompt) if prompt in self._held else None
            slot = source if source in free else free[0]
            assert slot is not None
            free.remove(slot)
            if source is None:
                prefills.append((slot, row))
            elif source != slot:
                copies.append((source, slot, len(prompt) - 1))
            self.slots[slot], self._held[slot] = row, prompt
            rows.append((slot, row))
        return Admission(rows, self._grouped([pair for pair in prefills if len(pair[1].request.prompt) > 1]), copies)

    def _grouped(self, rows: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
        """In groups, padded each to its longest, within the budget; at least one row in each."""
        groups: list[list[tuple[int, Row]]] = []
        for pair in rows:
            length = len(pair[1].request.prompt) - 1  # they come by growing length
            if groups and (len(groups[-1]) + 1) * length <= self._prefill_tokens:
                groups[-1].append(pair)
            else:
                groups.append([pair])
        return groups

    def accept(self, tokens: Sequence[int], log_probs: Sequence[float], sampling: SamplingParams) -> list[int]:
        """Appends a step's tokens, by slot, to the rows; returns the slots of those that ended."""
        ended = []
        for slot, row in self.live:
            row.response.append(tokens[slot])
            row.log_probs.append(log_probs[slot])
            stopped = tokens[slot] in sampling.stop_token_ids
            if stopped or len(row.response) >= sampling.max_response_tokens:
                row.cut = not stopped
                self.done.append(row)
                self.slots[slot] = None
                ended.append(slot)
        return ended

    def narrow(self) -> list[tuple[int, int, int]]:
        """Once nothing waits, brings the rows into fewer slots where that makes a step narrower.

        Returns:
            Source slot, target slot, and tokens to copy, of the rows that have to move.
        """
        live = self.live
        width = self._width_of(len(live))
        if self._waiting or not live or width >= self.width:
            return []
        self.width = width
        free = [slot for slot in range(width) if self.slots[slot] is None]
        moves = []
        for (slot, row), target in zip([pair for pair in live if pair[0] >= width], free, strict=False):
            self.slots[target], self.slots[slot] = row, None
            moves.append((slot, target, row.position))
        return moves

    def _width_of(self, rows: int) -> int:
        """The least width in use that has room: an eighth of the slots, two eighths, ...; below that 1, 2, 4, ..."""
        share = -(-len(self.slots) // _SHARES)
        if rows < share:
            return min(share, 1 << max(0, rows - 1).bit_length())
        return min(len(self.slots), -(-rows // share) * share)


def reach_of(longest: int, capacity: int) -> int:
    """How far attention looks for `longest` positions: one of a few lengths, at most an eighth too long beyond 512."""
    step = max(64, 1 << max(0, longest.bit_length() - 4))
    return min(capacity, -(-longest // step) * step)
