"""Configuration of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.config.checks import above, at_least, one_of


@dataclass(kw_only=True)
class TrainingConfig:
    """Steps, batches, and what happens every so many steps."""

    steps: int = 200
    """Optimizer steps (the paper trains at most 200)."""
    prompts_per_step: int = 32
    """Questions per step over all data-parallel ranks, one rollout each (the paper's batch)."""
    microbatch_tokens: int = 8192
    """Padded tokens of one forward and backward pass of the student; gradients accumulate over them."""
    frozen_tokens: int = 32768
    """Padded tokens of one forward pass of the frozen branches, which keep no activations."""
    validate_every: int = 50
    """Evaluate on `data.validation` every so many steps; 0 only at the start and the end."""
    checkpoint_every: int = 50
    """Save a NeMo checkpoint every so many steps; 0 only at the end."""
    self_check: bool = True
    """Before step 1, prove on one batch that the student equals the base and that, with the PMI off, loss and
    gradient are 0."""
    async_save: bool = False
    """Write checkpoints in the background, from copies in CPU memory, while training goes on. The next save, and the
    end of the run, wait for it; an error surfaces at the next step."""
    keep_last: int = 2
    """Checkpoints to keep besides `final`, the newest; 0 keeps all. An old one is removed once a newer is complete."""
    keep_best: int = 0
    """Checkpoints to keep besides those, the best by `best_metric`."""
    best_metric: str = "validation/accuracy"
    """Name in metrics.jsonl. A checkpoint at whose step it was not measured is none of the best."""
    best_is: str = "max"
    """Whether the greatest (`max`) or the least (`min`) value is best."""
    collective_timeout: float = 1800
    """Seconds that a rank waits for the others before it fails. Must exceed the difference between the fastest and
    the slowest rank's rollouts."""
    export_huggingface: bool = True
    """Write a Hugging Face checkpoint (adapters merged) at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "microbatch_tokens", "frozen_tokens"):
            above(f"training.{name}", getattr(self, name), 0)
        at_least("training.validate_every", self.validate_every, 0)
        at_least("training.checkpoint_every", self.checkpoint_every, 0)
        at_least("training.keep_last", self.keep_last, 0)
        at_least("training.keep_best", self.keep_best, 0)
        one_of("training.best_is", self.best_is, ("max", "min"))
        above("training.collective_timeout", self.collective_timeout, 0)
