"""The interface of rollout engines: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. The loss does not use these values."""

    temperature: float
    """Divides the logits; 0 selects the most likely token."""
    top_p: float
    """Keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    max_response_tokens: int
    """Longer responses are truncated here."""
    stop_token_ids: frozenset[int]
    """Any of these ends a response and is its last token."""
    token_budget: int = 0
    """Tokens after which responses are left unfinished, summed over the ranks with the same requests; 0 finishes all.
    Requests with `run_to_end`, and the first response to end, always finish."""


@dataclass(frozen=True)
class Request:
    """One response to generate."""

    prompt: Sequence[int]
    """Token ids, not text, which would lose the chat template."""
    seed: int
    """Determines the random numbers of this response, independently of the batch (see `row_seed`)."""
    partial: Rollout | None = None
    """The unfinished response of an earlier call, which is continued with the next random numbers."""
    run_to_end: bool = False
    """Whether the response is generated to its end regardless of the token budget."""


@dataclass(frozen=True)
class Rollout:
    """One response."""

    response: list[int]
    """Token ids, including the stop token if there is one; empty only if unfinished."""
    log_probs: list[float]
    """Log-probability of each token under the model itself: temperature 1, nothing filtered."""
    truncated: bool
    """Whether the response reached the limit without a stop token."""
    weights_version: int
    """Number of completed training steps at generation; if several versions generated the response, the last one."""
    unfinished: bool = False
    """Whether generation stopped before the end because of a token budget."""
    segments: tuple[tuple[int, int], ...] = ()
    """Weights version and number of tokens of each part, in order, if several versions generated it; otherwise
    empty."""

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Weights version and number of tokens of each part; a single part if one version generated all."""
        return self.segments or ((self.weights_version, len(self.response)),)

    def age(self, version: int) -> int:
        """Number of steps between the weights that generated its oldest token and those of `version`."""
        return version - min(part_version for part_version, _ in self.parts)

    def token_ages(self, version: int) -> int:
        """Sum of the ages of its tokens."""
        return sum((version - part_version) * tokens for part_version, tokens in self.parts)


class RolloutEngine(Protocol):
    """Generates responses from the student's weights."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """Returns one response per request, in order. Collective over the ranks that share the model."""


class PendingRollouts(Protocol):
    """Responses that are being generated."""

    def result(self) -> list[Rollout]:
        """Waits, and returns one response per request, in order. Collective over the ranks that share the model."""


@runtime_checkable
class ConcurrentEngine(RolloutEngine, Protocol):
    """Generates outside the training processes, which can continue meanwhile."""

    def submit(self, requests: Sequence[Request], sampling: SamplingParams) -> PendingRollouts:
        """Starts to generate with the current weights. Collective over the ranks that share the model."""


def row_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed from the run's seed and the parts that identify the response: step, row id, sample.

    A hash, not a sum: seeds of neighbouring steps and rows are unrelated. The parallel layout has no influence.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sibling_seeds(first: int, count: int) -> list[int]:
    """Seeds of several responses to one prompt: `first` and the integers that follow it. vLLM derives the seeds of the
    samples of one request in the same way.
    """
    return [first + index for index in range(count)]
