"""Callbacks of Lightning between steps."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_popsd.model.checkpoints import RunCheckpoints
from nemo_popsd.parallel.signals import StopSignals


class StepBoundary(Callback):
    """Saves checkpoints and handles signals between steps, on all ranks together.

    Saves before a step, not after one: at that point Lightning has written the metrics of the last step and has
    validated, so a checkpoint never covers more steps than metrics.jsonl does.
    """

    def __init__(self, checkpoints: RunCheckpoints, stop: StopSignals) -> None:
        """Keeps references only."""
        self._checkpoints = checkpoints
        self._stop = stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reinstalls the signal handlers; Lightning's would stop one rank alone."""
        self._stop.retake()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reinstalls the signal handlers."""
        self._stop.retake()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Saves if a checkpoint is due."""
        self._checkpoints.maybe_save()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Records the random state after a step, before any validation."""
        self._checkpoints.after_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the random state, so that an interrupted validation does not change the training."""
        self._checkpoints.after_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the random state for the final checkpoint."""
        self._checkpoints.at_end()
