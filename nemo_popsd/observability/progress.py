"""Progress of training and validation on the terminal and in logs."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from nemo_popsd.observability.metrics import PREFIX
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.runtime.pace import Pace

_SHOWN = {"loss": ("loss", ".4g"), "response_tokens": ("tokens/response", ".0f"), "tokens_per_second": ("tok/s", ".0f")}


class StepProgress(ProgressBar):
    """Shows step k of N, loss, response length, tokens per second, elapsed and remaining time, on rank 0.

    Shows a bar on a terminal, and prints one line per step elsewhere (logs, CI); likewise for the batches of a
    validation with several batches. One training batch is one step; the values are the latest metrics under `PREFIX`
    that the trainer logged.

    Args:
        steps: number of steps of the run (`training.steps`).
        completed: number of steps that a resumed run has completed.
        enabled: `observability.progress_bar`.
    """

    def __init__(self, steps: int, *, completed: int = 0, enabled: bool = True) -> None:
        super().__init__()
        self._steps = steps
        self._completed = completed
        self._enabled = enabled and is_rank_zero()
        self._bar: tqdm | None = None
        self._pace = Pace(steps, completed=completed)
        self._validation_bar: tqdm | None = None
        self._validation_pace: Pace | None = None
        self._validation_batches = 0

    @property
    def is_enabled(self) -> bool:
        """Always true, so that `LightningModule.print` uses `print` below."""
        return True

    def disable(self) -> None:
        """Disables the progress; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Enables the progress on rank 0."""
        self._enabled = is_rank_zero()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the bar if standard error is a terminal."""
        self._pace = Pace(self._steps, completed=self._completed)
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=self._steps, initial=self._completed, desc="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Advances by one step."""
        self._completed += 1
        if not self._enabled:
            return
        shown = _shown(trainer.callback_metrics)
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        else:
            values = "".join(f"  {name} {value}" for name, value in shown.items())
            times = self._pace.after(self._completed)
            print(f"step {self._completed}/{self._steps}{values}  {times}", file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar if there are several batches and standard error is a terminal."""
        self._validation_batches = round(sum(trainer.num_val_batches))
        self._validation_pace = Pace(self._validation_batches)
        if self._enabled and self._validation_batches > 1 and sys.stderr.isatty():
            self._validation_bar = tqdm(total=self._validation_batches, desc="validation", leave=False)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advances by one batch."""
        if not self._enabled or self._validation_batches < 2 or self._validation_pace is None:
            return
        if self._validation_bar is not None:
            self._validation_bar.update()
        else:
            times = self._validation_pace.after(batch_idx + 1)
            print(f"validation {batch_idx + 1}/{self._validation_batches}  {times}", file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar of the validation."""
        self._close_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar and leaves it on the screen."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar and leaves it on the screen, so that the error is not printed into it."""
        self._close_validation()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_validation(self) -> None:
        if self._validation_bar is not None:
            self._validation_bar.close()
            self._validation_bar = None

    def print(self, *args: object, **kwargs: object) -> None:
        """Prints on rank 0, above the bar if there is one. Called by `LightningModule.print`."""
        if is_rank_zero():
            tqdm.write(" ".join(str(argument) for argument in args), **kwargs)


def _shown(metrics: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        label: format(float(metrics[PREFIX + name]), spec)
        for name, (label, spec) in _SHOWN.items()
        if PREFIX + name in metrics
    }
