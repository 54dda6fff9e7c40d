"""Types of the two files of a diagnosis, `summary.json` and `rollouts.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypedDict

Group: TypeAlias = Mapping[str, Any]
"""One group of tokens: ``tokens`` (int), a `Spread` or None for each measure, and ``from`` and ``to`` for a bin.

The measures are declared in `nemo_popsd.distillation.statistics`, so a `TypedDict` cannot list the keys.
"""


class Spread(TypedDict):
    """Mean and quartiles of a measure."""

    mean: float
    q25: float
    median: float
    q75: float


class Groups(TypedDict):
    """Measures of all tokens, of marker tokens and other tokens, and by bins."""

    all: Group
    markers: Group
    others: Group
    position: list[Group]
    entropy: list[Group]


class PushedEntry(TypedDict):
    """The push on one vocabulary entry, per 1,000 tokens."""

    id: int
    text: str
    mass: float | None
    push: dict[str, float | None]
    """First-order change by component."""


class MarkerPush(TypedDict):
    """The push on the vocabulary entries of one marker, per 1,000 tokens."""

    entries: int
    mass: float | None
    push: dict[str, float | None]
    """First-order change by component."""


class Extremes(TypedDict):
    """The vocabulary entries that one component promotes and suppresses most."""

    promoted: list[PushedEntry]
    suppressed: list[PushedEntry]


class Push(TypedDict):
    """The push of each component."""

    tokens: int
    components: dict[str, Extremes]
    markers: dict[str, MarkerPush | None]
    """Push by marker; None if no vocabulary entry equals the marker."""


class SettingsRecord(TypedDict):
    """The settings that a summary records."""

    data: str
    rows: int
    student: str
    seed: int
    rollout: dict[str, object]
    target: dict[str, object]
    markers: list[str]


class Summary(TypedDict):
    """Content of `summary.json`, without its digests."""

    format: int
    name: str
    step: int
    settings: SettingsRecord
    rollouts: int
    tokens: int
    measures: dict[str, str]
    groups: Groups
    push: Push


class RolloutRecord(TypedDict):
    """One line of `rollouts.jsonl`."""

    row: str
    question: str
    reference: str
    truncated: bool
    pieces: list[str]
    """Text of each token."""
    marked: list[int]
    """1 for each token of a marker, otherwise 0."""
    values: dict[str, list[float | None]]
    """One value per token by name."""
    alternatives: dict[str, object] | None
    """The most probable tokens at each position; None unless the rollout is stored token by token."""
