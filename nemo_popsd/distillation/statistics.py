"""Declarations of per-token statistics other than the loss. Metrics, loggers, report and diagnosis use them.

Token statistics compare the student p = π_θ with the target q = P on every response token, for every divergence.
Signal statistics decompose the teacher's signal (eq. 4) on a sample of tokens:

    Δ_total = log π_T − log π_θ = Δ_ref + Δ_it
    Δ_ref   = log π_ref − log π_θ      reference-induced, not transferable
    Δ_it    = log π_T − log π_ref      question-conditioned, transferable

This module does not import torch: formulas use the methods of the tensors that they receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class VocabStats(NamedTuple):
    """Statistics over the full vocabulary [R], the same on every shard."""

    max_s: Tensor
    max_t: Tensor
    z_s: Tensor
    """Z_s."""
    z_t: Tensor
    """Z_t."""
    mean_difference: Tensor
    """Σ p·(t - s), where t and s have their maximum subtracted."""
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    target_entropy: Tensor


class SignalProducts(NamedTuple):
    """Norms and inner products over the full true vocabulary, per token [D]."""

    norm_total: Tensor
    """‖Δ_total‖."""
    norm_reference: Tensor
    """‖Δ_ref‖."""
    norm_question: Tensor
    """‖Δ_it‖."""
    total_question: Tensor
    """⟨Δ_total, Δ_it⟩."""
    total_reference: Tensor
    """⟨Δ_total, Δ_ref⟩."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """Declaration of a per-token statistic. Its mean over tokens is logged."""

    name: str
    """Name in metrics (`train/NAME`), in records of a diagnosis and in code."""
    symbol: str
    """Title of plots and columns."""
    unit: str
    """Unit, or "" for a pure number."""
    meaning: str
    """What it measures, or how to interpret it."""


@dataclass(frozen=True, kw_only=True)
class TokenStatistic(Statistic):
    """A statistic of student and target at one token, measured on every response token."""

    definition: Callable[[Tensor, Tensor], Tensor]
    """Maps log p and log q [N, v] to the terms [N, v] whose sum over the full vocabulary is the statistic."""
    closed_form: Callable[[VocabStats], Tensor]
    """Computes the statistic [N] from results of the loss."""


@dataclass(frozen=True, kw_only=True)
class SignalStatistic(Statistic):
    """A statistic of the decomposed signal at one token, measured on a sample of tokens."""

    formula: Callable[[SignalProducts], Tensor]
    """Maps norms and products [D] to the statistic [D]; NaN where it is undefined; these tokens are excluded."""


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; NaN if the denominator is exactly 0 (student and teacher agree)."""
    return numerator / denominator.where(denominator != 0, math.nan)


TOKEN_STATISTICS: tuple[TokenStatistic, ...] = (
    TokenStatistic(
        name="forward_kl",
        symbol="KL(target ‖ student)",
        unit="nats per token",
        meaning="how far the target is from the student",
        definition=lambda log_p, log_q: log_q.exp() * (log_q - log_p),
        closed_form=lambda stats: stats.forward_kl,
    ),
    TokenStatistic(
        name="reverse_kl",
        symbol="KL(student ‖ target)",
        unit="nats per token",
        meaning="how unlikely the student's tokens are under the target",
        definition=lambda log_p, log_q: log_p.exp() * (log_p - log_q),
        closed_form=lambda stats: stats.reverse_kl,
    ),
    TokenStatistic(
        name="student_entropy",
        symbol="Entropy of the student",
        unit="nats per token",
        meaning="how undecided the student is",
        definition=lambda log_p, log_q: -(log_p.exp() * log_p),
        closed_form=lambda stats: stats.student_entropy,
    ),
    TokenStatistic(
        name="target_entropy",
        symbol="Entropy of the target",
        unit="nats per token",
        meaning="how undecided the target is",
        definition=lambda log_p, log_q: -(log_q.exp() * log_q),
        closed_form=lambda stats: stats.target_entropy,
    ),
)
"""Measured on every response token."""

SIGNAL_STATISTICS: tuple[SignalStatistic, ...] = (
    SignalStatistic(
        name="norm_ratio",
        symbol="‖Δ_ref‖ / ‖Δ_total‖",
        unit="",
        meaning="above 1: the reference-induced part is larger than the complete signal",
        formula=lambda signal: quotient(signal.norm_reference, signal.norm_total),
    ),
    SignalStatistic(
        name="cosine_question",
        symbol="cos(Δ_total, Δ_it)",
        unit="",
        meaning="below 0: plain OPSD pushes against the question-conditioned part",
        formula=lambda signal: quotient(signal.total_question, signal.norm_total * signal.norm_question),
    ),
    SignalStatistic(
        name="cosine_reference",
        symbol="cos(Δ_total, Δ_ref)",
        unit="",
        meaning="near 1: plain OPSD follows the reference-induced part",
        formula=lambda signal: quotient(signal.total_reference, signal.norm_total * signal.norm_reference),
    ),
)
"""Measured on the diagnosed tokens."""


@dataclass(frozen=True)
class StatisticValues:
    """Values of declared statistics for the same tokens, detached."""

    declared: Sequence[Statistic]
    """Their declarations, in the order of the values."""
    values: Tensor
    """[len(declared), N]."""

    def __getitem__(self, name: str) -> Tensor:
        """The values [N] of the statistic called `name`."""
        return self.values[[statistic.name for statistic in self.declared].index(name)]
