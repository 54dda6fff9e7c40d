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
    """How far the rollout engine and the trainer disagree about the sampled tokens of a step; `training.mismatch` has
    the definitions. Of the first update of the step.
    """

    kl: float
    """Estimate of KL(engine ‖ trainer) per token, in nats."""
    start_kl: float
    """Estimate of KL(engine ‖ trainer) over the first 32 tokens of each response, where a wrong prompt shows most."""
    mean_ratio: float
    """Mean of the trainer's probability over the engine's."""
    max: float
    """Largest difference of the log-probabilities of a token."""
    share: float
    """Share of the tokens whose log-probabilities differ by more than `guard.mismatch_token`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostMetrics:
    """What a step costs. Operations are those of one GPU by the formulas of `popsd plan`, at the mean lengths of the
    step.
    """

    tokens_per_gpu: float | None = None
    """Response tokens per second of the step and GPU."""
    tflops: float | None = None
    """TFLOP/s of one GPU in the frozen branches and in training; recomputed operations count."""
    mfu: float | None = None
    """Share of the peak of the GPU that the operations of the step reach over its seconds, rollouts included; known for
    H100, H200, H800, A100 and B200. With `rollout.overlap`, without the rollouts."""
    memory_rollout: float | None = None
    """Peak of the memory of tensors while responses are generated, in GiB, of the rank that needs most; on GPUs."""
    memory_frozen: float | None = None
    """Peak of tensor memory in the frozen branches, in GiB."""
    memory_train: float | None = None
    """Peak of tensor memory in training, in GiB."""
    seconds_weights: float | None = None
    """Seconds of the last transfer of weights to a vLLM server, of the replica that takes longest."""
    seconds_waiting: float | None = None
    """Seconds that a rank waited for the rollouts of other replicas, of the rank that waited longest."""
    seconds_predicted: float | None = None
    """Seconds of the step that `popsd plan` estimates at these lengths with its defaults; on an H100."""
    predicted_ratio: float | None = None
    """Measured seconds of the step over the predicted ones."""


GROUPS = {"mismatch": ("rollout/mismatch_", MismatchMetrics), "cost": ("cost/", CostMetrics)}
"""Prefix and class of the fields of `StepMetrics` that have metrics under a prefix of their own."""


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
    """Share of responses whose final answer is that of the row; of rows with answers (`data.train.columns.answer` or
    `data.train.answer_pattern`)."""
    accuracy_at_n: float | None
    """With `rollout.per_prompt` above 1: share of questions with at least one right response, of rows with answers."""
    weighted_share: float
    """Share of response tokens that count in the loss: with a weight, and open (`distillation.tokens`)."""
    marker_rate: float
    """Epistemic markers (`evaluation.markers`) per 1,000 response tokens."""
    repetition: float
    """Share of the response tokens that complete a passage of 8 tokens which the response had before."""
    rollout_age: float
    """Number of steps between the weights that generated a response token and the weights that are trained on it; mean
    over tokens."""
    rollout_age_max: float
    """Age of the oldest token."""
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
    mismatch: MismatchMetrics | None = None
    """Engine against trainer."""
    cost: CostMetrics | None = None
    """Memory, operations, waiting."""

    def as_dict(self) -> dict[str, float]:
        """The measured metrics by their names in all loggers, in the order of declaration."""
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
