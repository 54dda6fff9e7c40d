"""What every rollout engine offers: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
    that were begun before are finished in any case, and so is the first row."""


@dataclass(frozen=True)
class Request:
    """One response to draw."""

    prompt: Sequence[int]
    """Token ids; never text, which would lose the chat template."""
    seed: int
    """Determines the random numbers of this response, whatever else is in the batch (see `row_seed`)."""
    begun: Rollout | None = None
    """What an earlier call drew and left unfinished: goes on from there, with the random numbers that come next."""


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
    """Number of optimizer steps behind the weights that drew it, or the last part of it."""
    unfinished: bool = False
    """Whether it was left before its end, for a token budget."""
    segments: tuple[tuple[int, int], ...] = ()
    """Weights version and number of tokens of each part, in order, if several versions drew it; else empty."""

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Weights version and number of tokens of each part; one, if one version drew all."""
        return self.segments or ((self.weights_version, len(self.response)),)


class RolloutEngine(Protocol):
    """Draws responses from the student's weights."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """One response per request, in order. Collective over the ranks that share the model."""


def row_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed from the run's seed and what names the row: step, row id, sample.

    A hash, not a sum: seeds of neighbouring steps and rows are unrelated, and no layout enters.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
