"""The metrics of a training step: name, unit and meaning of each, for the loop, the loggers and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS, Statistic

PREFIX = "train/"
"""Prefix of the name of every training metric, in all loggers."""

DECLARED: tuple[Statistic, ...] = (*TOKEN_STATISTICS, *SIGNAL_STATISTICS)
"""Per-token statistics that are metrics by their declaration in `nemo_popsd.distillation.statistics`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Metrics of one training step, over all data-parallel ranks. None: not measured in this step, and not logged."""

    loss: float
    """The loss, averaged as set by `distillation.loss_mean`; mean over the updates of the step."""
    statistics: Mapping[str, float | None]
    """Means of `DECLARED` over tokens, by name; None if no token of the step has a value."""
    response_tokens: float
    """Mean length of a response, in tokens."""
    cut_share: float
    """Share of responses truncated at `rollout.max_response_tokens`."""
    response_diversity: float | None
    """With `rollout.per_prompt` above 1: share of distinct 4-grams of tokens among all responses to a question, mean
    over questions."""
    accuracy: float | None
    """With `rollout.per_prompt` above 1, where the training rows have answers (`data.train.columns.answer`): share of
    responses with the right answer."""
    accuracy_at_n: float | None
    """Like `accuracy`: share of questions with at least one right response."""
    marker_rate: float
    """Epistemic markers (`evaluation.markers`) per 1,000 response tokens."""
    rollout_age: float
    """Number of steps between the weights that generated a response token and the weights that are trained on it; mean
    over tokens."""
    rollout_age_max: float
    """The same for the oldest token."""
    padding_share: float
    """Share of padding among the tokens of the forward passes of student and frozen branches."""
    frozen_tokens: float
    """Tokens that went through the frozen branches, without padding."""
    frozen_tokens_saved: float
    """Tokens of their sequences that were not computed, because another sequence of the step has the same prefix
    (`training.share_prefixes`)."""
    frozen_saved_share: float
    """Share of the saved tokens among the tokens of all sequences of the frozen branches."""
    grad_norm: float
    """Global gradient norm before clipping, of the last update of the step."""
    learning_rate: float
    """Learning rate of this step."""
    tokens_per_second: float
    """Response tokens per second of the step, over all ranks."""
    seconds_rollout: float
    """Seconds of generating responses; with `rollout.overlap`, of waiting for them."""
    seconds_frozen: float
    """Seconds of the base, privileged-teacher and reference-only forwards."""
    seconds_train: float
    """Seconds of the student's forward, backward and optimizer step."""

    def as_dict(self) -> dict[str, float]:
        """The measured metrics, with `PREFIX`, in the order of declaration."""
        values: dict[str, float | None] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            values |= value if item.name == "statistics" else {item.name: value}
        return {PREFIX + name: value for name, value in values.items() if value is not None}
