"""The metrics of a training step: name, unit and meaning of each, for the loop, the loggers and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS, Statistic

PREFIX = "train/"
"""Prefix of the name of every training metric, in all loggers."""

DECLARED: tuple[Statistic, ...] = (*TOKEN_STATISTICS, *SIGNAL_STATISTICS)
"""Per-token statistics that are metrics by their declaration in `nemo_popsd.distillation.statistics`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchMetrics:
    """Differences between rollout engine and trainer about the sampled tokens, in the first update of a step;
    `training.mismatch` has the definitions.
    """

    kl: float
    """Estimate of KL(engine ‖ trainer) per token, in nats."""
    start_kl: float
    """KL(engine ‖ trainer) over the first 32 tokens of each response, which differ most if prompts differ."""
    mean_ratio: float
    """Mean ratio of the trainer's probability of a token to the engine's."""
    max: float
    """Largest difference of the log-probabilities of a token."""
    share: float
    """Share of tokens whose log-probabilities differ by more than `guard.mismatch_token`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostMetrics:
    """Cost of a step. Operations are counted for one GPU with the formulas of `popsd plan` at the mean lengths of the
    step.
    """

    tokens_per_gpu: float | None = None
    """Response tokens per second and GPU."""
    tflops: float | None = None
    """TFLOP/s of one GPU in the frozen branches and in training, including recomputed operations."""
    mfu: float | None = None
    """Operations of the step divided by its seconds and by the peak FLOP/s of the GPU. Includes the rollouts, except
    with `rollout.overlap`. Available on H100, H200, H800, A100 and B200."""
    memory_rollout: float | None = None
    """Peak tensor memory during the rollouts, in GiB, on the rank with the highest peak; only on GPUs."""
    memory_frozen: float | None = None
    """Peak tensor memory in the frozen branches, in GiB, on the rank with the highest peak; only on GPUs."""
    memory_train: float | None = None
    """Peak tensor memory in training, in GiB, on the rank with the highest peak; only on GPUs."""
    seconds_weights: float | None = None
    """Seconds of the last transfer of weights to a vLLM server, for the slowest replica."""
    seconds_waiting: float | None = None
    """Seconds that a rank waited for the rollouts of other replicas; maximum over ranks."""
    seconds_predicted: float | None = None
    """Seconds of the step as estimated by `popsd plan` with its defaults at these lengths, on an H100."""
    predicted_ratio: float | None = None
    """Ratio of the measured to the predicted seconds of the step."""


GROUPS = {"mismatch": ("rollout/mismatch_", MismatchMetrics), "cost": ("cost/", CostMetrics)}
"""Prefix and class of the fields of `StepMetrics` whose metrics have a separate prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Metrics of one training step over all data-parallel ranks. None means not measured and not logged."""

    loss: float
    """The loss with the mean of `distillation.loss_mean`, averaged over the updates of the step."""
    statistics: Mapping[str, float | None]
    """Means of `DECLARED` over tokens, by name; None if no token of the step has a value."""
    response_tokens: float
    """Mean length of a response, in tokens."""
    cut_share: float
    """Share of responses truncated at `rollout.max_response_tokens`."""
    response_diversity: float | None
    """With `rollout.per_prompt` above 1: share of distinct token 4-grams among all responses to a question, mean over
    questions."""
    accuracy: float | None
    """Share of responses whose final answer matches that of the row, among rows with answers
    (`data.train.columns.answer` or `data.train.answer_pattern`)."""
    accuracy_at_n: float | None
    """With `rollout.per_prompt` above 1: share of questions with at least one right response, among rows with
    answers."""
    weighted_share: float
    """Share of response tokens that count in the loss: open and with a weight above 0 (`distillation.tokens`)."""
    marker_rate: float
    """Epistemic markers (`evaluation.markers`) per 1,000 response tokens."""
    repetition: float
    """Share of response tokens that complete a passage of 8 tokens that occurred earlier in the response."""
    rollout_age: float
    """Number of steps between the weights that generated a response token and the trained weights, mean over tokens."""
    rollout_age_max: float
    """Number of steps between the weights that generated the oldest response token and the trained weights."""
    padding_share: float
    """Share of padding among the tokens of the forward passes of student and frozen branches."""
    frozen_tokens: float
    """Tokens that the frozen branches computed, without padding."""
    frozen_tokens_saved: float
    """Tokens that the frozen branches did not compute, because another sequence of the step has the same prefix
    (`training.share_prefixes`)."""
    frozen_saved_share: float
    """Share of saved tokens among all tokens of the sequences of the frozen branches."""
    grad_norm: float
    """Global gradient norm before clipping, in the last update of the step."""
    learning_rate: float
    """Learning rate of this step."""
    tokens_per_second: float
    """Response tokens per second, over all ranks."""
    seconds_rollout: float
    """Seconds to generate responses; with `rollout.overlap`, seconds to wait for them."""
    seconds_frozen: float
    """Seconds of the base, privileged-teacher and reference-only forwards."""
    seconds_train: float
    """Seconds of the student's forward, backward and optimizer step."""
    mismatch: MismatchMetrics | None = None
    """Comparison of engine and trainer."""
    cost: CostMetrics | None = None
    """Memory, operations and waiting times."""

    def as_dict(self) -> dict[str, float]:
        """The measured metrics by their names in loggers, in order of declaration."""
        values: dict[str, float | None] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in GROUPS:
                group = {} if value is None else asdict(value)
                values |= {GROUPS[item.name][0] + name: entry for name, entry in group.items()}
            else:
                named = value if item.name == "statistics" else {item.name: value}
                values |= {PREFIX + name: entry for name, entry in named.items()}
        return {name: value for name, value in values.items() if value is not None}
