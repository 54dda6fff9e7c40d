"""What rollout engines offer: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; nothing here touches the loss."""

    temperature: float
    """Divides the logits; 0 takes the most likely token."""
    top_p: float
    """Keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    max_response_tokens: int
    """Responses are cut here."""
    stop_token_ids: frozenset[int]
    """Any of these ends a response, and is its last token."""
    token_budget: int = 0
    """Tokens after which rows are left unfinished, over the ranks that have the same requests; 0 finishes all. Rows
    that must end do so in any case, and so does the first row."""


@dataclass(frozen=True)
class Request:
    """One response to draw."""

    prompt: Sequence[int]
    """Token ids; never text, which would lose the chat template."""
    seed: int
    """Determines the random numbers of this response, whatever else is in the batch (see `row_seed`)."""
    begun: Rollout | None = None
    """What an earlier call drew and left unfinished: goes on from there, with the random numbers that come next."""
    run_to_end: bool = False
    """Whether it is drawn to its end, whatever the token budget."""


@dataclass(frozen=True)
class Rollout:
    """One response."""

    response: list[int]
    """Token ids, the stop token included where there is one; empty only if unfinished."""
    log_probs: list[float]
    """Log-probability of each token under the model itself: temperature 1, nothing filtered."""
    cut: bool
    """Whether the limit was reached without a stop token."""
    weights_version: int
    """Number of steps behind the weights that drew it; of several, those of the last call."""
    unfinished: bool = False
    """Whether it was left before its end, for a token budget."""
    segments: tuple[tuple[int, int], ...] = ()
    """Weights version and number of tokens of each part, in order, if other versions drew any; else empty."""

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Weights version and number of tokens of each part; one, if one version drew all."""
        return self.segments or ((self.weights_version, len(self.response)),)

    def age(self, version: int) -> int:
        """How many steps the weights that drew its oldest token are behind those of `version`."""
        return version - min(drawn_by for drawn_by, _ in self.parts)

    def token_ages(self, version: int) -> int:
        """Sum of the ages of its tokens."""
        return sum((version - drawn_by) * tokens for drawn_by, tokens in self.parts)


class RolloutEngine(Protocol):
    """Draws responses from the student's weights."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """One response per request, in order. Collective over the ranks that share the model."""


class PendingRollouts(Protocol):
    """Responses that are being drawn."""

    def result(self) -> list[Rollout]:
        """One per request, in order; waits for them. Collective over the ranks that share the model."""


@runtime_checkable
class ConcurrentEngine(RolloutEngine, Protocol):
    """Draws outside the training processes, which can do something else meanwhile."""

    def begin(self, requests: Sequence[Request], sampling: SamplingParams) -> PendingRollouts:
        """Begins to draw, by the weights as they are now. Collective over the ranks that share the model."""


def row_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed from the run's seed and what names the row: step, row id, sample.

    A hash, not a sum: seeds of neighbouring steps and rows are unrelated, and no layout enters.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
