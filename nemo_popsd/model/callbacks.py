"""What Lightning calls between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class SaveCheckpoints(Callback):
    """Writes a NeMo checkpoint every so many steps, on all ranks together."""

    def __init__(self, every: int, directory: Path) -> None:
        self._every = every
        self._directory = directory

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after a step that `every` divides, but for the last: the end of the run saves that one."""
        model: Any = pl_module
        steps = model.completed_steps
        if self._every and steps % self._every == 0 and trainer.global_step < trainer.max_steps:
            model.save_to(str(self._directory / f"step-{steps:06d}"))
