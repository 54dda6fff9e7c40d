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
    unfinished: bool = False
    """Whether it was left before its end."""

    @classmethod
    def of(cls, number: int, request: Request) -> Row:
        """The row of a request, with what was drawn for it earlier."""
        begun = request.begun
        return cls(number, request) if begun is None else cls(number, request, [*begun.response], [*begun.log_probs])

    @property
    def context(self) -> list[int]:
        """Prompt and response so far."""
        return [*self.request.prompt, *self.response]

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
    The prompt of a row that was begun earlier includes what was drawn then; such rows come first, those that must end
    before all others.

    Attributes:
        width: the first so many slots are computed in each step.
        slots: the row in each slot, or None.
        done: rows that ended, or were left unfinished.
        drawn: tokens so far.
    """

    def __init__(self, requests: Sequence[Request], slots: int, *, prefill_tokens: int) -> None:
        """Queues all requests, those with prompts of like length and with the same prompt side by side.

        Args:
            requests: prompts are not empty.
            slots: rows in the cache at one time.
            prefill_tokens: most tokens, padding included, of one prefill of several rows.
        """
        rows = [Row.of(number, request) for number, request in enumerate(requests)]
        rows.sort(key=lambda row: (not row.request.run_to_end, row.request.begun is None, row.position, row.context))
        self._waiting = rows[::-1]
        self._prefill_tokens = prefill_tokens
        self.slots: list[Row | None] = [None] * slots
        self._held: list[tuple[int, ...] | None] = [None] * slots
        self.width = slots
        self.done: list[Row] = []
        self.drawn = 0

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
            prompt = tuple(row.context)
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
        return Admission(rows, self._grouped([pair for pair in prefills if pair[1].position > 0]), copies)

    def _grouped(self, rows: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
        """In groups, padded each to its longest, within the budget; at least one row in each."""
        groups: list[list[tuple[int, Row]]] = []
        for pair in rows:
            if groups and _prefilled([*groups[-1], pair]) <= self._prefill_tokens:
                groups[-1].append(pair)
            else:
                groups.append([pair])
        return groups

    def accept(self, tokens: Sequence[int], log_probs: Sequence[float], sampling: SamplingParams) -> list[int]:
        """Appends a step's tokens, by slot, to the rows; returns the slots of those that ended."""
        ended = []
        for slot, row in self.live:
            self.drawn += 1
            row.response.append(tokens[slot])
            row.log_probs.append(log_probs[slot])
            stopped = tokens[slot] in sampling.stop_token_ids
            if stopped or len(row.response) >= sampling.max_response_tokens:
                row.cut = not stopped
                self.done.append(row)
                self.slots[slot] = None
                ended.append(slot)
        return ended

    def leave_unfinished(self, budget: int) -> list[int]:
        """Once a step more would draw more than `budget` tokens, leaves all rows but those that must end.

        Not before one row has ended, so that there is something to train on.

        Returns:
            The slots of those that were being drawn.
        """
        if not budget or not self.done or self.drawn + len(self.live) <= budget:
            return []
        left = [(slot, row) for slot, row in self.live if not row.request.run_to_end]
        waiting = [row for row in self._waiting if not row.request.run_to_end]
        self._waiting = [row for row in self._waiting if row.request.run_to_end]
        for row in [*waiting, *(row for _, row in left)]:
            row.unfinished = True
            self.done.append(row)
        for slot, _ in left:
            self.slots[slot] = None
        return [slot for slot, _ in left]

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
            self._held[target], self._held[slot] = self._held[slot], None
            moves.append((slot, target, row.position))
        return moves

    def _width_of(self, rows: int) -> int:
        """The least width in use that has room: an eighth of the slots, two eighths, ...; below that 1, 2, 4, ..."""
        share = -(-len(self.slots) // _SHARES)
        if rows < share:
            return min(share, 1 << max(0, rows - 1).bit_length())
        return min(len(self.slots), -(-rows // share) * share)


def _prefilled(group: list[tuple[int, Row]]) -> int:
    """Tokens of one prefill, padding included."""
    return len(group) * max(row.position for _, row in group)


def reach_of(longest: int, capacity: int) -> int:
    """How far attention looks for `longest` positions: one of a few lengths, at most an eighth too long beyond 256."""
    step = max(32, 1 << max(0, longest.bit_length() - 4))
    return min(capacity, -(-longest // step) * step)
