"""Handles alarms of `nemo_popsd.training.drift` in a Lightning run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from nemo_popsd.errors import UserError
from nemo_popsd.observability.jsonl_logger import read_metric, read_steps
from nemo_popsd.parallel.agreement import from_rank_zero
from nemo_popsd.training.config import DriftConfig
from nemo_popsd.training.drift import METRICS, PREFIX, QUANTITIES, Alarm, DriftWatch

logger = logging.getLogger(__name__)


class DriftGuard(Callback):
    """Monitors the metrics of a run: logs warnings, selects checkpoints to keep, and ends the run between two steps.

    The metrics of a step are equal on all ranks, so every rank finds the same alarms without a collective. A resumed
    run restores the state of the detector from its metrics file.
    """

    def __init__(self, settings: DriftConfig, output: str | Path) -> None:
        """Store the settings, without reading files."""
        self._settings = settings
        self._output = Path(output)
        self._watch: DriftWatch | None = None
        self._stops: list[Alarm] = []

    def __call__(self, step: int, metrics: Mapping[str, float], loggers: Sequence[Logger]) -> None:
        """Process the metrics of a step before they are written; the first call reads earlier steps. Collective.

        An alarm is passed directly to the loggers, because Lightning would repeat its value at every later step.
        """
        if self._watch is None:
            self._watch = self._resumed()
        alarms = self._watch.update(step, metrics)
        for alarm in alarms:
            action = self._settings.action(alarm.name)
            logger.warning("step %d: %s (guard.drift.%s=%s)", step, alarm, alarm.name, action)
            for target in loggers:
                target.log_metrics(alarm.entry, step=step)
            if action == "stop":
                self._stops.append(alarm)

    def changes(self) -> list[int]:
        """Return the last step before each change whose earlier checkpoint is kept.

        Includes changes with an alarm (from the metrics file), and changes that may lead to an alarm, because the
        checkpoint from before must still exist then.
        """
        names = [name for name in QUANTITIES if self._settings.action(name) in ("keep", "stop")]
        recorded = [int(abs(onset)) for name in names for onset in read_metric(self._output, PREFIX + name).values()]
        return recorded + [onset for name in names if self._watch for onset in self._watch.suspected(name)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """End the run if an alarm requires it. The metrics of its step have been written; nothing is saved.

        Raises:
            UserError: an alarm has the action `stop`; on every rank.
        """
        if not self._stops:
            return
        alarm = self._stops[0]
        raise UserError(
            f"step {alarm.step}",
            got=str(alarm),
            need=f"a change within guard.drift.slack={self._settings.slack:g}",
            fix=f"continue from a checkpoint of step {alarm.onset} or before with another optimizer.lr, or set "
            f"guard.drift.{alarm.name}=keep or a larger guard.drift.slack",
        )

    def _resumed(self) -> DriftWatch:
        """Build a detector from the metrics file. Collective: a gather and a broadcast of objects."""
        steps = from_rank_zero(
            f"metrics of {self._output}",
            lambda: read_steps(self._output, METRICS, PREFIX),
            need="the run's own metrics file",
            fix="restore it, or set output for another run",
        )
        watch = DriftWatch(self._settings)
        for step, metrics in steps:
            watch.update(step, metrics)
        return watch
