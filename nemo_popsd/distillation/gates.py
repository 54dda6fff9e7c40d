"""Gates: which tokens have a loss, given student and target at the token. This module does not need torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_popsd.distillation.statistics import VocabStats

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_popsd.distillation.config import TokensConfig


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Conditions on a token, which is open if all hold. Distributions are at the temperature of the loss.

    The conditions use statistics that the loss has on every rank of the vocabulary group before it computes its
    gradient, so a gate adds no pass over the vocabulary and no collective.
    """

    max_student_probability: float = 1.0
    """Maximum probability of the student's most likely token."""
    student_entropy: tuple[float, float] = (0.0, math.inf)
    """Minimum and maximum entropy of the student, in nats."""
    target_entropy: tuple[float, float] = (0.0, math.inf)
    """Minimum and maximum entropy of the target, in nats."""

    def __bool__(self) -> bool:
        """Whether any condition can close a token."""
        return self != Gates()

    def open(self, stats: VocabStats) -> Tensor:
        """Whether each token is open, bool [R]; False if the student's statistics are NaN."""
        is_open = stats.z_s > 0
        if self.max_student_probability < 1:
            is_open = 1 / stats.z_s <= self.max_student_probability  # the largest exponential is 1
        for entropy, (low, high) in (
            (stats.student_entropy, self.student_entropy),
            (stats.target_entropy, self.target_entropy),
        ):
            if low > 0:
                is_open = is_open & (entropy >= low)
            if high < math.inf:
                is_open = is_open & (entropy <= high)
        return is_open


def build_gates(config: TokensConfig) -> Gates:
    """The gates that `config` specifies."""

    def upper(value: float | None) -> float:
        return math.inf if value is None else value

    return Gates(
        max_student_probability=config.max_student_probability,
        student_entropy=(config.min_student_entropy, upper(config.max_student_entropy)),
        target_entropy=(config.min_target_entropy, upper(config.max_target_entropy)),
    )
