"""The checkpoints of a run: when to save, at most one save in flight, and removal of old checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.retention import FINAL, Checkpoints, name_of, prune, superfluous, update_latest
from nemo_popsd.checkpoint.save import Content, PendingSave
from nemo_popsd.checkpoint.training_state import Copies, load_random_state, load_training_state
from nemo_popsd.files.atomic import flush_file
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.observability.jsonl_logger import FILE_NAME, read_metric
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.distributed import layout, on_any_rank
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.runtime.random_state import capture_random_state, restore_random_state
from nemo_popsd.training.config import TrainingConfig

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves the state of a run between its steps. All ranks call its methods together.

    Attributes:
        check_lock: raises if the output belongs to another run; called before anything is written or removed.
        folder: directory of the checkpoints.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        output: str | Path,
        *,
        content: Callable[[], Content],
        completed_steps: Callable[[], int],
        stop: StopSignals,
        resumed: NemoCheckpoint | None,
        changes: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        """Store the settings, without reading files.

        Args:
            settings: when to save and which checkpoints to keep.
            output: directory of the run.
            content: returns weights, optimizer and facts after the last completed step; this class adds the random
                state.
            completed_steps: returns the number of completed training steps.
            stop: stop requests, for which `maybe_save` raises.
            resumed: the checkpoint from which the run continues.
            changes: returns steps after which the run changed; a checkpoint from before each is kept (see
                `superfluous`).
        """
        self._settings = settings
        self._output = Path(output)
        self._content = content
        self._completed_steps = completed_steps
        self._stop = stop
        self._changes = changes
        self.folder = self._output / "checkpoints"
        self._saved = resumed.step if resumed else 0
        self._resumed = resumed
        self._pending: PendingSave | None = None
        self._random: dict[str, Tensor] = {}
        self.check_lock: Callable[[], None] = lambda: None
        self._reported: set[str] = set()

    def maybe_save(self) -> None:
        """Finish a written save, handle signals, and save a checkpoint if one is due; called between two steps.

        Collectives: two all-reduces of one number, and one more while a save is in flight.

        Raises:
            StopRequested: a stop was requested; on every rank.
            UserError, TransientError: the output belongs to another run; on every rank.
            UserError: this save, or the one in flight, failed.
        """
        if self._resumed is not None:
            _restore_random_state(self._resumed)
            self._resumed = None
        self._random = capture_random_state()
        self._refuse_lost_lock()
        if self._pending is not None and not on_any_rank(not self._pending.written):
            self.wait()
        self._stop.raise_if_requested()
        steps, every = self._completed_steps(), self._settings.checkpoint_every
        if every and steps > self._saved and steps % every == 0 and steps < self._settings.steps:
            self.save(name_of(steps))

    def after_step(self) -> None:
        """Record the random state: a validation may follow, and a signal may interrupt it."""
        self._random = capture_random_state()

    def after_validation(self) -> None:
        """Restore the random state recorded after the last step."""
        if self._random:
            restore_random_state(self._random)

    def at_end(self) -> None:
        """Record the random state for the final checkpoint, after the last step."""
        self._random = capture_random_state()

    def save(self, name: str) -> Path:
        """Save weights and training state after the last completed step, in the background with `training.async_save`.

        Raises:
            UserError: this save, or the one in flight, failed; older checkpoints are unchanged.
        """
        self.wait()
        self._refuse_lost_lock()
        path = self.folder / name
        raise_on_all_ranks(
            f"checkpoint {path}",
            lambda: self._flush_metrics() if dist.get_rank() == 0 else None,
            need="the run's own directory",
            fix="free space, or set output",
        )
        content = replace(self._content(), random_state=self._random)
        self._pending = PendingSave(path, content, background=self._settings.async_save)
        self._saved = content.step
        if not self._settings.async_save:
            self.wait()
        return path

    def save_last_step(self) -> None:
        """Save the last completed step unless it has been saved."""
        if (steps := self._completed_steps()) > self._saved:
            self.save(name_of(steps))
        self.wait()

    def save_final(self) -> Path:
        """Save the final checkpoint, and wait for it."""
        path = self.save(FINAL)
        self.wait()
        return path

    def wait(self) -> None:
        """Wait for the save in flight, then update the file `latest` and remove old checkpoints."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._refuse_lost_lock()
        pending.finish()
        raise_on_all_ranks(
            f"checkpoint {pending.path}",
            lambda: self._tidy(pending.path) if dist.get_rank() == 0 else None,
            need="permission to replace older checkpoints",
            fix="free space, or set output",
        )
        logger.info("checkpoint %s: %s", pending.path, pending.summary)

    def _refuse_lost_lock(self) -> None:
        """Raise on all ranks if the output belongs to another run. Otherwise one all-reduce of one number."""
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                self.check_lock()
            except Exception as raised:
                error = raised
        if not on_any_rank(error is not None):
            return

        def fail() -> None:
            if error is not None:
                raise error

        raise_on_all_ranks(f"output {self._output}", fail, need="a directory that can be read", fix="set output")

    def _flush_metrics(self) -> None:
        """Flush the metrics to disk before the checkpoint that relies on them."""
        metrics = self._output / FILE_NAME
        if metrics.is_file():
            flush_file(metrics)

    def _tidy(self, newest: Path) -> None:
        self.check_lock()
        update_latest(newest)
        settings = self._settings
        scores = read_metric(self._output, settings.best_metric) if settings.keep_best else {}
        checkpoints = Checkpoints.in_folder(self.folder)
        names = superfluous(
            checkpoints.complete,
            scores,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            greatest=settings.best_is == "max",
            changes=self._changes(),
        )
        kept = dict.fromkeys(prune(self.folder, names), "it contains files that no run wrote")
        for name, reason in (kept | {name: str(error.got) for name, error in checkpoints.damaged.items()}).items():
            if name not in self._reported:
                logger.warning("checkpoint %s is kept: %s", self.folder / name, reason)
        self._reported |= kept.keys() | checkpoints.damaged.keys()


def resume_optimizer(
    checkpoint: NemoCheckpoint, models: Sequence[ModelChunk], optimizer: StudentOptimizer, copies: Copies | None = None
) -> None:
    """Restore optimizer, schedule and moving copies from `checkpoint`, which any layout may have written."""
    optimizer.resume(load_training_state(checkpoint.directory, models, optimizer.megatron, copies))


def _restore_random_state(checkpoint: NemoCheckpoint) -> None:
    """Restore the generators. Called at the first step boundary, because Lightning's set-up uses the generators.

    In another layout the generators start from the seed: rollouts, data order and adapters do not depend on them.
    """
    if checkpoint.manifest["layout"] == layout():
        load_random_state(checkpoint.directory)
    else:
        logger.info("resuming in another layout than %s", checkpoint.manifest["layout"])
