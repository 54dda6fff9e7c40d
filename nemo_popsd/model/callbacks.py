"""What Lightning calls between steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepBoundary(Callback):
    """Saves and obeys signals between steps, on all ranks together.

    Before a step rather than after one: by then Lightning has written the metrics of the last step and has validated,
    so a checkpoint never stands for more steps than metrics.jsonl does.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals back from Lightning, which would stop one rank alone."""
        model: Any = pl_module
        model.stop.retake()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        model: Any = pl_module
        model.stop.retake()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The boundary."""
        model: Any = pl_module
        model.checkpoints.maybe_save(model)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step, before any validation."""
        model: Any = pl_module
        model.checkpoints.after_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The generators are as if it had not been: a run that stops during a validation, or is killed, ends alike."""
        model: Any = pl_module
        model.checkpoints.after_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last one."""
        model: Any = pl_module
        model.checkpoints.at_end()
