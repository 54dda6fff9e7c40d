"""Assigns sequences to slots of the cache: waiting sequences enter slots that others have left. Uses no tensors.

Decisions depend only on the requests and the sampled tokens, which are the same on all ranks of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_popsd.rollout.engine import Request, SamplingParams

PREFILL_TOKENS = 8192
"""Maximum number of tokens in one prefill of several prompts. Its activations exist for one layer at a time, and are
small compared with those of training."""
_SHARES = 8
"""Sequences enter once an eighth of the slots is free, and the computed width shrinks by eighths, because each entry
costs a forward pass and each shrink costs copies."""


@dataclass
class DecodingSequence:
    """A request and the tokens generated for it so far."""

    index: int
    """Index of the request."""
    request: Request
    response: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = False
    """Whether the response ended at the limit."""
    unfinished: bool = False
    """Whether decoding stopped before the end because of a token budget."""

    @classmethod
    def of(cls, index: int, request: Request) -> DecodingSequence:
        """The sequence of a request, with the tokens of an earlier call."""
        partial = request.partial
        return (
            cls(index, request) if partial is None else cls(index, request, [*partial.response], [*partial.log_probs])
        )

    @property
    def context(self) -> list[int]:
        """Prompt and response so far."""
        return [*self.request.prompt, *self.response]

    @property
    def position(self) -> int:
        """Position that the next step writes to the cache: that of the last token of prompt and response so far."""
        return len(self.request.prompt) + len(self.response) - 1

    @property
    def last(self) -> int:
        """The token at `position`."""
        return self.response[-1] if self.response else self.request.prompt[-1]


@dataclass(frozen=True)
class Admission:
    """Sequences that enter slots."""

    sequences: list[tuple[int, DecodingSequence]]
    """Slot and sequence of each."""
    prefills: list[list[tuple[int, DecodingSequence]]]
    """Sequences whose prompts must be prefilled, in groups that are computed together."""
    copies: list[tuple[int, int, int]]
    """Source slot, target slot and length of prompts that the cache already holds; copied after the prefills."""


class SlotSchedule:
    """The queue of waiting sequences, the sequences in slots, and those that are done.

    The keys of a prompt are computed once for all sequences with this prompt that are adjacent in the queue: a slot
    keeps the prompt of its sequence until another sequence occupies the slot. The last token of a prompt is not
    prefilled; the first step computes it. The prompt of a partial response includes its tokens. Responses that must run
    to their end come first, then other partial responses.

    Attributes:
        width: number of leading slots that each step computes.
        slots: the sequence in each slot, or None.
        done: sequences that ended or were left unfinished.
        generated: number of tokens so far.
    """

    def __init__(self, requests: Sequence[Request], slots: int, *, prefill_tokens: int) -> None:
        """Queues all requests, sorted so that prompts of similar length, and equal prompts, are adjacent.

        Args:
            requests: requests with non-empty prompts.
            slots: maximum number of sequences in the cache at one time.
            prefill_tokens: maximum number of tokens, padding included, in one prefill of several sequences.
        """
        sequences = [DecodingSequence.of(index, request) for index, request in enumerate(requests)]
        sequences.sort(
            key=lambda sequence: (
                not sequence.request.run_to_end,
                sequence.request.partial is None,
                sequence.position,
                sequence.context,
            )
        )
        self._waiting = sequences[::-1]
        self._prefill_tokens = prefill_tokens
        self.slots: list[DecodingSequence | None] = [None] * slots
        self._prompts: list[tuple[int, ...] | None] = [None] * slots
        self.width = slots
        self.done: list[DecodingSequence] = []
        self.generated = 0

    @property
    def live(self) -> list[tuple[int, DecodingSequence]]:
        """Slot and sequence for each sequence that is being decoded."""
        return [(slot, sequence) for slot, sequence in enumerate(self.slots) if sequence is not None]

    @property
    def unfinished(self) -> bool:
        """Whether any sequence is waiting or being decoded."""
        return bool(self._waiting) or any(sequence is not None for sequence in self.slots)

    @property
    def longest(self) -> int:
        """Maximum number of positions to which a sequence attends in the next step."""
        return max(sequence.position for _, sequence in self.live) + 1

    def admit(self) -> Admission | None:
        """Puts waiting sequences into free slots once enough slots are free; None if no sequence enters."""
        free = [slot for slot, sequence in enumerate(self.slots) if sequence is None]
        enough = max(1, len(self.slots) // _SHARES)
        if not self._waiting or len(free) < min(enough, len(self._waiting)):
            return None
        sequences, prefills, copies = [], [], []
        while free and self._waiting:
            sequence = self._waiting.pop()
            prompt = tuple(sequence.context)
            source = self._prompts.index(prompt) if prompt in self._prompts else None
            slot = source if source in free else free[0]
            assert slot is not None
            free.remove(slot)
            if source is None:
                prefills.append((slot, sequence))
            elif source != slot:
                copies.append((source, slot, len(prompt) - 1))
            self.slots[slot], self._prompts[slot] = sequence, prompt
            sequences.append((slot, sequence))
        return Admission(sequences, self._grouped([pair for pair in prefills if pair[1].position > 0]), copies)

    def _grouped(self, sequences: list[tuple[int, DecodingSequence]]) -> list[list[tuple[int, DecodingSequence]]]:
        """Splits `sequences` into groups within the token budget, each padded to its longest sequence."""
        groups: list[list[tuple[int, DecodingSequence]]] = []
        for pair in sequences:
            if groups and _prefilled([*groups[-1], pair]) <= self._prefill_tokens:
                groups[-1].append(pair)
            else:
                groups.append([pair])
        return groups

    def accept(self, tokens: Sequence[int], log_probs: Sequence[float], sampling: SamplingParams) -> list[int]:
        """Appends the tokens of a step, indexed by slot, to the sequences; returns the slots of those that ended."""
        ended = []
        for slot, sequence in self.live:
            self.generated += 1
            sequence.response.append(tokens[slot])
            sequence.log_probs.append(log_probs[slot])
            stopped = tokens[slot] in sampling.stop_token_ids
            if stopped or len(sequence.response) >= sampling.max_response_tokens:
                sequence.truncated = not stopped
                self.done.append(sequence)
                self.slots[slot] = None
                ended.append(slot)
        return ended

    def leave_unfinished(self, budget: int) -> list[int]:
        """Leaves sequences unfinished once another step would exceed `budget` tokens, except those that run to their
        end.

        No sequence is left before the first one has ended, so that there is something to train on.

        Returns:
            The slots of sequences that were being decoded.
        """
        if not budget or not self.done or self.generated + len(self.live) <= budget:
            return []
        left = [(slot, sequence) for slot, sequence in self.live if not sequence.request.run_to_end]
        waiting = [sequence for sequence in self._waiting if not sequence.request.run_to_end]
        self._waiting = [sequence for sequence in self._waiting if sequence.request.run_to_end]
        for sequence in [*waiting, *(sequence for _, sequence in left)]:
            sequence.unfinished = True
            self.done.append(sequence)
        for slot, _ in left:
            self.slots[slot] = None
        return [slot for slot, _ in left]

    def narrow(self) -> list[tuple[int, int, int]]:
        """Compacts the sequences into fewer slots if no sequence is waiting and this reduces the width of a step.

        Returns:
            Source slot, target slot and number of tokens to copy for each sequence that moves.
        """
        live = self.live
        width = self._width_of(len(live))
        if self._waiting or not live or width >= self.width:
            return []
        self.width = width
        free = [slot for slot in range(width) if self.slots[slot] is None]
        moves = []
        for (slot, sequence), target in zip([pair for pair in live if pair[0] >= width], free, strict=False):
            self.slots[target], self.slots[slot] = sequence, None
            self._prompts[target], self._prompts[slot] = self._prompts[slot], None
            moves.append((slot, target, sequence.position))
        return moves

    def _width_of(self, sequences: int) -> int:
        """The smallest width that fits: one eighth of the slots, two eighths, ...; below one eighth 1, 2, 4, ..."""
        share = math.ceil(len(self.slots) / _SHARES)
        if sequences < share:
            return min(share, 1 << max(0, sequences - 1).bit_length())
        return min(len(self.slots), math.ceil(sequences / share) * share)


def _prefilled(group: list[tuple[int, DecodingSequence]]) -> int:
    """Number of tokens of one prefill, padding included."""
    return len(group) * max(sequence.position for _, sequence in group)


def reach_of(longest: int, capacity: int) -> int:
    """Number of cached positions that attention reads for `longest` positions.

    The number is rounded up to one of a few lengths; beyond 256 by at most one eighth.
    """
    step = max(32, 1 << max(0, longest.bit_length() - 4))
    return min(capacity, math.ceil(longest / step) * step)
