"""Configuration of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_popsd.config.checks import above, at_least
from nemo_popsd.errors import UserError


@dataclass(kw_only=True)
class DiagnosisConfig:
    """Which rollouts the teacher's signal is decomposed on, and how finely it is told.

    Rows come from `data.train` (a reference solution is needed), rollouts are drawn as `rollout` says.
    """

    rows: int = 16
    """The first so many rows of `data.train`, one rollout each."""
    shown_rows: list[str] = field(default_factory=list)
    """Ids of rows whose rollouts are shown token by token, beside those of `rows` also further down the file. Empty
    shows the first `shown`."""
    shown: int = 4
    """Rollouts shown token by token where `shown_rows` names none."""
    alternatives: int = 8
    """Most likely tokens of student, base, teacher, probe and target that are kept for each token shown."""
    listed_tokens: int = 20
    """Tokens listed as most promoted, and as most suppressed, by each component."""
    position_bins: int = 16
    """Equal stretches of the response by which figures are averaged."""
    entropy_edges: list[float] = field(default_factory=lambda: [0.01, 0.1, 0.5, 1.0, 2.0])
    """Borders, in nats of the student's entropy, between the bins by which figures are averaged."""
    chunk_tokens: int = 128
    """Response tokens whose logits exist at one time, on each tensor-parallel rank."""
    in_training: bool = True
    """Diagnose at the start and at the end of every training run: twice `rows` rollouts and their forwards."""

    def __post_init__(self) -> None:
        for name in ("rows", "alternatives", "listed_tokens", "position_bins", "chunk_tokens"):
            above(f"diagnosis.{name}", getattr(self, name), 0)
        at_least("diagnosis.shown", self.shown, 0)
        edges = self.entropy_edges
        if any(edge <= 0 for edge in edges) or edges != sorted(set(edges)):
            raise UserError(
                "configuration",
                got=f"diagnosis.entropy_edges={edges!r}",
                need="positive numbers in rising order, each once",
                mend="set diagnosis.entropy_edges",
            )
