"""Configuration of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, check_numbers
from nemo_popsd.settings.checks import one_of, refuse


@dataclass(kw_only=True)
class TrainingConfig:
    """Steps, batches, and frequency of evaluations and checkpoints."""

    steps: Annotated[int, Bounds(1, 10**8)] = 200
    """Number of training steps (at most 200 in the paper). To extend a finished run, start it again with more steps.
    The learning rate is a function of the step and of this value, so it then jumps to that of an uninterrupted run with
    the new length: after a decay to `optimizer.min_lr` it rises again."""
    prompts_per_step: Annotated[int, Bounds(1, 2**16)] = 32
    """Questions per step over all data-parallel ranks (the paper's batch), with `rollout.per_prompt` rollouts each."""
    updates_per_step: Annotated[int, Bounds(1, 2**16)] = 1
    """Optimizer updates per step, each on the rollouts of an equal part of the questions. The frozen branches run once
    for all updates. From the second update on, training is slightly off-policy: the student has newer weights than
    those that generated the rollouts."""
    microbatch_tokens: Annotated[int, Bounds(1, 10**9)] = 8192
    """Tokens, including padding, of one forward and backward pass of the student; gradients accumulate over passes."""
    frozen_tokens: Annotated[int, Bounds(1, 10**9)] = 32768
    """Tokens, including padding, of one forward pass of the frozen branches, which keep no activations."""
    share_prefixes: str = "auto"
    """Whether the frozen branches compute each distinct token prefix of a step only once and reuse its keys and values:
    `true`, `false`, or `auto`, which enables it if several sequences of a row share most of their tokens, i.e. with
    `rollout.per_prompt` above 1 or `data.templates.order=reference_first`. Results differ only by rounding. With
    context parallelism, expert parallelism or sliding windows, each sequence is computed separately, and a warning is
    logged."""
    frozen_cache_tokens: Annotated[int, Bounds(0, 10**9)] = 65536
    """With `share_prefixes`: maximum number of positions whose keys and values are kept between forward passes of the
    frozen branches. A pass of `frozen_tokens` that contains all sequences of a row keeps none; other passes keep at
    most the longest sequence. Positions that do not fit are recomputed."""
    packing: bool = True
    """Concatenate the sequences of a forward pass instead of padding them to the longest one. Only the padding that the
    layout requires remains (`train/padding_share`)."""
    cache_on_host: bool = False
    """Keep the outputs of the frozen branches (4 to 6 bytes per token and hidden unit) in host memory until the loss
    needs them."""
    validate_every: Annotated[int, Bounds(0, 10**8)] = 50
    """Number of steps between evaluations on `data.validation`; 0 evaluates only before the first and after the last
    step."""
    checkpoint_every: Annotated[int, Bounds(0, 10**8)] = 50
    """Number of steps between NeMo checkpoints; 0 saves only at the end."""
    self_check: bool = True
    """Before step 1, verify on one batch that the student equals the base, and that loss and gradient are 0 without the
    PMI."""
    async_save: bool = False
    """Write checkpoints in the background, from copies in host memory, while training continues. The next save and the
    end of the run wait for the write; a failed write raises an error at the next step."""
    keep_last: Annotated[int, Bounds(0, 10**8)] = 2
    """Number of newest checkpoints to keep in addition to `final`; 0 keeps all. An old checkpoint is removed after a
    newer one is complete."""
    keep_best: Annotated[int, Bounds(0, 10**8)] = 0
    """Number of best checkpoints by `best_metric` to keep in addition."""
    best_metric: str = "validation/accuracy"
    """Name in metrics.jsonl. A checkpoint whose step has no value of this metric is never among the best."""
    best_is: str = "max"
    """Whether the highest (`max`) or the lowest (`min`) value is best."""
    collective_timeout: Annotated[float, Bounds(1, SECONDS_OF_30_DAYS)] = 1800
    """Seconds that a rank waits in a collective before it fails. Must exceed the time between the fastest and the
    slowest rank's rollouts."""
    export_huggingface: bool = True
    """Write a Hugging Face checkpoint at the end, with merged adapters."""

    def __post_init__(self) -> None:
        check_numbers(self, "training")
        if self.prompts_per_step % self.updates_per_step:
            raise UserError(
                "configuration",
                got=f"training.updates_per_step={self.updates_per_step} with training.prompts_per_step="
                f"{self.prompts_per_step}",
                need="updates on equal parts",
                fix="set training.updates_per_step to a divisor of training.prompts_per_step",
            )
        if not self.best_metric.startswith(("train/", "validation/")):
            raise refuse("training.best_metric", self.best_metric, "the name of a metric, as in validation/accuracy")
        one_of("training.share_prefixes", self.share_prefixes, ("auto", "true", "false"))
        one_of("training.best_is", self.best_is, ("max", "min"))


DRIFT_ACTIONS = ("off", "warn", "keep", "stop")


@dataclass(kw_only=True)
class DriftConfig:
    """The action when a quantity leaves the range of the first steps of the run, in either direction: `off` does not
    monitor it; `warn` logs a warning and records `guard/NAME`; `keep` also keeps the newest checkpoint from before the
    change; `stop` also ends the run on all ranks. See `nemo_popsd.training.drift`.
    """

    response_tokens: str = "keep"
    """Mean length of a response."""
    marker_rate: str = "keep"
    """Epistemic markers per 1,000 response tokens."""
    student_entropy: str = "keep"
    """Entropy of the student."""
    repetition: str = "keep"
    """Share of repeated text."""
    cut_share: str = "keep"
    """Share of truncated responses."""
    forward_kl: str = "warn"
    """Agreement with the target: KL(target ‖ student)."""
    accuracy: str = "keep"
    """Accuracy on `data.validation`, compared with the first evaluation, by its standard error."""
    baseline_steps: Annotated[int, Bounds(3, 10**6)] = 8
    """Number of first measurements of a quantity that form the baseline for later ones."""
    slack: Annotated[float, Bounds(0, 10)] = 0.05
    """Lasting change that raises no alarm: relative to the baseline, absolute for shares; four times this value for
    `forward_kl`."""
    threshold: Annotated[float, Bounds(1, 1e6)] = 8.0
    """Sum of the deviations beyond slack and noise, in standard deviations, above which an alarm is raised."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.drift")
        for name in DRIFT_QUANTITIES:
            one_of(f"guard.drift.{name}", self.action(name), DRIFT_ACTIONS)

    def action(self, name: str) -> str:
        """The action at an alarm of the quantity `name`."""
        found: str = getattr(self, name)
        return found


DRIFT_QUANTITIES = tuple(item.name for item in fields(DriftConfig) if item.type == "str")
"""Names of the monitored quantities."""


@dataclass(kw_only=True)
class GuardConfig:
    """Checks of a run during training, and their thresholds for a warning or a stop."""

    mismatch: str = "stop"
    """The action when the rollout engine and the trainer disagree about the sampled tokens (`rollout/mismatch_kl` and
    `rollout/mismatch_start_kl`): `stop` ends the run on all ranks before the weights change, and reports the likely
    causes; `warn` only logs a warning; `off` only measures."""
    mismatch_warn: Annotated[float | None, Bounds(0, 1e6)] = None
    """KL in nats per token at which a mismatch is reported. null: 1e-7 if engine and trainer compute in fp32 on CPUs
    with the same weights; otherwise 0.02, which covers rounding to bf16 or TF32 and weights that are one step old
    (`rollout.overlap`)."""
    mismatch_stop: Annotated[float | None, Bounds(0, 1e6)] = None
    """KL in nats per token above which `mismatch=stop` ends the run. null: 1e-6 in fp32 on CPUs with the same weights,
    otherwise 0.1."""
    mismatch_token: Annotated[float, Bounds(0, 20)] = 1.0
    """Minimum difference of a token's two log-probabilities at which it counts in `rollout/mismatch_share`."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """Alarms for collapse."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard")
        one_of("guard.mismatch", self.mismatch, ("stop", "warn", "off"))
        if (
            self.mismatch_warn is not None
            and self.mismatch_stop is not None
            and self.mismatch_warn > self.mismatch_stop
        ):
            raise UserError(
                "configuration",
                got=f"guard.mismatch_warn={self.mismatch_warn:g} with guard.mismatch_stop={self.mismatch_stop:g}",
                need="a warning at or below the stop",
                fix="set guard.mismatch_warn lower",
            )
