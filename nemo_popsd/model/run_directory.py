"""The output directory of a run: what a new attempt finds there, and what tells how far it came.

config.yaml     resolved configuration of the last attempt
metrics.jsonl   one line per step and per evaluation
checkpoints/    step-000050, ..., final; the file `latest` names the newest
validation/     what each evaluation drew and found: step-000000, ...
rollouts/       what each step was trained on
DONE            the run is finished
REQUEUE         the run was asked to stop and has saved
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nemo_popsd.atomic import recover, remove, write_text
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.retention import newest
from nemo_popsd.config.consistency import RUN_FILES
from nemo_popsd.config.loading import save_resolved
from nemo_popsd.config.resuming import DONE, REQUEUE, refuse_another_run
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.model.evaluation import remove_validations_after, validation_directory
from nemo_popsd.observability.jsonl_logger import keep_until, read_metric
from nemo_popsd.output_lock import Hold, OutputLock
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.runtime.agreement import do_together


class RunDirectory:
    """What all ranks read, and rank 0 writes, below `output`. Methods are called by all ranks together."""

    def __init__(self, config: PopsdConfig) -> None:
        self._config = config
        self.output = Path(config.output)
        self._checkpoints = self.output / "checkpoints"
        self._hold: Hold | None = None

    def share_lock(self, lock: OutputLock | None) -> None:
        """Tells all ranks of the lock that rank 0 has. Collective: one broadcast of an object."""
        found = [None if lock is None else lock.hold]
        dist.broadcast_object_list(found, src=0)
        self._hold = found[0]

    def is_own(self) -> bool:
        """Whether the output is still this run's; on any rank."""
        return self._hold is None or self._hold.is_own()

    def check_lock(self) -> None:
        """Refuses to write into an output that is another run's by now; on any rank.

        Raises:
            UserError, TransientError: see `nemo_popsd.output_lock.Hold.check`.
        """
        if self._hold is not None:
            self._hold.check()

    def refuse_lost_lock(self) -> None:
        """The same on all ranks together. Collective: one gather of objects."""
        self._on_rank_zero(lambda: None)

    def checkpoint(self) -> NemoCheckpoint | None:
        """The newest complete checkpoint, to resume from; None begins anew.

        Half-written ones are removed. With `overwrite` nothing is looked at.

        Raises:
            UserError: its run had other settings.
        """
        if self._config.overwrite:
            return None
        self._on_rank_zero(lambda: recover(self._checkpoints))
        found = newest(self._checkpoints)
        if found is None:
            return None
        checkpoint = NemoCheckpoint(found)
        refuse_another_run(checkpoint.config, self._config)
        return checkpoint

    def begin(self, completed: int) -> None:
        """Makes the directory say that the run stands after step `completed`: what an attempt left of later steps goes,
        with `overwrite` everything.
        """
        self._on_rank_zero(lambda: self._begin(completed))

    def first_validation_is_missing(self) -> bool:
        """Whether an evaluation before the first step is due, which no attempt has made yet."""
        return bool(self._config.data.validation.path) and not validation_directory(str(self.output), 0).concluded

    def validation_is_missing(self, completed: int) -> bool:
        """Whether the evaluation that was due after step `completed` was cut off."""
        every = self._config.training.validate_every
        due = bool(self._config.data.validation.path) and every > 0 and completed > 0 and completed % every == 0
        return due and completed not in read_metric(self.output, "validation/accuracy")

    def mark_finished(self, steps: int) -> None:
        """From now on the same command has nothing to do."""
        self._on_rank_zero(lambda: write_text(self.output / DONE, f"{steps}\n"))

    def mark_stopped(self, steps: int) -> None:
        """Asks whoever started the run to start it again."""
        self._on_rank_zero(lambda: write_text(self.output / REQUEUE, f"{steps}\n"))

    def _begin(self, completed: int) -> None:
        if self._config.overwrite:
            for name in RUN_FILES:
                path = self.output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        for name in (DONE, REQUEUE):
            remove(self.output / name)
        keep_until(self.output, completed)
        remove_validations_after(self.output, completed)
        RolloutStore(self.output).remove_after(completed + 1)
        save_resolved(self._config, self.output / "config.yaml")

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        def act() -> None:
            if dist.get_rank() == 0:
                self.check_lock()
                action()

        do_together(
            f"output {self.output}",
            act,
            need="a directory that can be written",
            mend="set output",
        )
