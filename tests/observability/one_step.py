"""A Lightning module that only logs, and a trainer with one device, as in a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import lightning.pytorch as lightning
import torch


class Logging(lightning.LightningModule):
    """Logs a few metrics per batch of an endless epoch, without training."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def train_dataloader(self) -> Iterator[int]:
        return itertools.count()

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: int, batch_idx: int) -> None:
        values = {"train/loss": 0.5 + batch, "train/response_tokens": 100.0, "train/tokens_per_second": 2000.0}
        self.log_dict(values)
        for logger in self.loggers:
            logger.log_metrics(values, step=batch + 1)
        if batch == 0:
            self.print("a line of text")


def fit(batches: int, **settings: object) -> None:
    """Runs `batches` training batches."""
    settings.setdefault("enable_progress_bar", False)
    lightning.Trainer(
        max_epochs=1,
        limit_train_batches=batches,
        devices=1,
        accelerator="cpu",
        strategy="auto",
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    ).fit(Logging())
