"""Configuration of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import SECONDS_OF_30_DAYS, Bounds, check_numbers
from nemo_popsd.settings.checks import one_of, refuse


@dataclass(kw_only=True)
class TrainingConfig:
    """Steps, batches, and how often to evaluate and save."""

    steps: Annotated[int, Bounds(1, 10**8)] = 200
    """Training steps (the paper trains at most 200). A finished run continues if it is started again with more steps.
    The learning rate is a function of the step and of this value, so it then jumps to that of an uninterrupted run of
    the new length: after a decay to `optimizer.min_lr` it rises again."""
    prompts_per_step: Annotated[int, Bounds(1, 2**16)] = 32
    """Questions per step over all data-parallel ranks (the paper's batch), with `rollout.per_prompt` rollouts each."""
    updates_per_step: Annotated[int, Bounds(1, 2**16)] = 1
    """Optimizer updates per step, each on the rollouts of an equal part of its questions. The frozen branches run once
    for all of them. From the second update on, the student has newer weights than those that generated the rollouts:
    slightly off-policy."""
    microbatch_tokens: Annotated[int, Bounds(1, 10**9)] = 8192
    """Tokens, padding included, of one forward and backward pass of the student; gradients accumulate over them."""
    frozen_tokens: Annotated[int, Bounds(1, 10**9)] = 32768
    """Tokens, padding included, of one forward pass of the frozen branches, which keep no activations."""
    share_prefixes: str = "auto"
    """Whether the frozen branches compute each distinct token prefix of a step once, and what follows attends to its
    kept keys and values: `true`, `false`, or `auto`, on where several sequences of a row share most of their tokens,
    with `rollout.per_prompt` above 1 or `data.templates.order=reference_first`. Results differ only by rounding.
    Context parallelism, expert parallelism and sliding windows compute each sequence separately, and the log says so.
    """
    frozen_cache_tokens: Annotated[int, Bounds(0, 10**9)] = 65536
    """With `share_prefixes`: most positions whose keys and values are kept between two forward passes of the frozen
    branches. A pass of `frozen_tokens` that holds all sequences of a row keeps none; others keep at most the longest
    sequence. What does not fit is computed again."""
    packing: bool = True
    """Concatenate sequences in a forward pass instead of padding them to the longest: the only padding is what the
    layout requires (`train/padding_share`)."""
    cache_on_host: bool = False
    """Keep the outputs of the frozen branches (4 to 6 bytes per token and hidden unit) in host memory until the loss
    needs them."""
    validate_every: Annotated[int, Bounds(0, 10**8)] = 50
    """Number of steps between evaluations on `data.validation`; 0 evaluates only before the first and after the last
    step."""
    checkpoint_every: Annotated[int, Bounds(0, 10**8)] = 50
    """Number of steps between NeMo checkpoints; 0 saves only at the end."""
    self_check: bool = True
    """Before step 1, verify on one batch that the student equals the base and that, with the PMI off, loss and gradient
    are 0."""
    async_save: bool = False
    """Write checkpoints in the background, from copies in CPU memory, while training continues. The next save, and the
    end of the run, wait for it; an error is raised at the next step."""
    keep_last: Annotated[int, Bounds(0, 10**8)] = 2
    """Checkpoints to keep besides `final`, the newest; 0 keeps all. An old one is removed once a newer is complete."""
    keep_best: Annotated[int, Bounds(0, 10**8)] = 0
    """Checkpoints to keep in addition, the best by `best_metric`."""
    best_metric: str = "validation/accuracy"
    """Name in metrics.jsonl. A checkpoint without a measurement at its step is not among the best."""
    best_is: str = "max"
    """Whether the greatest (`max`) or the least (`min`) value is best."""
    collective_timeout: Annotated[float, Bounds(1, SECONDS_OF_30_DAYS)] = 1800
    """Seconds that a rank waits for the others before it fails. Must exceed the difference between the fastest and
    the slowest rank's rollouts."""
    export_huggingface: bool = True
    """Write a Hugging Face checkpoint (adapters merged) at the end."""

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
    """What happens when a quantity leaves the range of the run's own first steps, in either direction: `off` does not
    watch it; `warn` warns and records it as `guard/NAME`; `keep` also keeps the newest checkpoint from before the
    change; `stop` does that and ends the run on all ranks. See `nemo_popsd.training.drift`.
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
    """First measurements of a quantity, with which later ones are compared."""
    slack: Annotated[float, Bounds(0, 10)] = 0.05
    """Lasting change that is no alarm: relative to the baseline, absolute for shares; four times that for
    `forward_kl`."""
    threshold: Annotated[float, Bounds(1, 1e6)] = 8.0
    """Sum of the deviations beyond slack and noise, in standard deviations, that is an alarm."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.drift")
        for name in DRIFT_QUANTITIES:
            one_of(f"guard.drift.{name}", self.action(name), DRIFT_ACTIONS)

    def action(self, name: str) -> str:
        """What happens at an alarm of the quantity `name`."""
        found: str = getattr(self, name)
        return found


DRIFT_QUANTITIES = tuple(item.name for item in fields(DriftConfig) if item.type == "str")
"""Names of the quantities that are watched."""


@dataclass(kw_only=True)
class GuardConfig:
    """What a run watches in itself, and when it warns or stops."""

    mismatch: str = "stop"
    """What happens when the rollout engine and the trainer disagree about the sampled tokens (`rollout/mismatch_kl` and
    `rollout/mismatch_start_kl`): `stop` ends the run on all ranks before the weights change, with the likely causes;
    `warn` warns only; `off` measures only."""
    mismatch_warn: Annotated[float | None, Bounds(0, 1e6)] = None
    """KL in nats per token from which on a mismatch is reported. null: 1e-7 where engine and trainer compute in fp32
    on CPUs with the same weights, else 0.02: rounding to bf16 or TF32, or weights that are a step older
    (`rollout.overlap`)."""
    mismatch_stop: Annotated[float | None, Bounds(0, 1e6)] = None
    """KL in nats per token beyond which `mismatch=stop` ends the run. null: 1e-6 in fp32 on CPUs with the same
    weights, else 0.1."""
    mismatch_token: Annotated[float, Bounds(0, 20)] = 1.0
    """Difference of a token's two log-probabilities from which on it counts in `rollout/mismatch_share`."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """Alarms at collapse."""

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
