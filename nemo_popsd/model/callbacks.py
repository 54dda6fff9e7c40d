"""The callback that Lightning calls between steps."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_popsd.model.checkpoints import RunCheckpoints
from nemo_popsd.parallel.signals import StopSignals


class StepBoundary(Callback):
    """Saves checkpoints and handles signals between steps, on all ranks together.

    A checkpoint is saved before a step, not after one: by then Lightning has written the metrics of the last step and
    has validated, so a checkpoint never covers more steps than metrics.jsonl.
    """

    def __init__(self, checkpoints: RunCheckpoints, stop: StopSignals) -> None:
        """Store the references."""
        self._checkpoints = checkpoints
        self._stop = stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reinstall the signal handlers; Lightning's handlers would stop only one rank."""
        self._stop.retake()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reinstall the signal handlers."""
        self._stop.retake()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Save a checkpoint if one is due."""
        self._checkpoints.maybe_save()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Record the random state after a step, before any validation."""
        self._checkpoints.after_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random state, so that an interrupted validation does not change the training."""
        self._checkpoints.after_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the random state for the final checkpoint."""
        self._checkpoints.at_end()
