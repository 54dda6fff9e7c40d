"""The checkpoints of a run: when one is due, one in flight at a time, which of the old ones go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.retention import FINAL, Checkpoints, name_of, prune, superfluous, update_latest
from nemo_popsd.checkpoint.save import Content, PendingSave
from nemo_popsd.checkpoint.training_state import load_random_state, load_training_state
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.files.atomic import flush_file
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.observability.jsonl_logger import FILE_NAME, read_metric
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.distributed import layout, on_any_rank
from nemo_popsd.runtime.random_state import capture_random_state, restore_random_state

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves the state of a run at the boundaries of its steps. All ranks call its methods together.

    Attributes:
        check_lock: raises if the output is another run's by now; asked before anything is written or removed.
    """

    def __init__(self, config: PopsdConfig, *, resumed: NemoCheckpoint | None) -> None:
        """Looks at nothing yet.

        Args:
            config: the run.
            resumed: the checkpoint from which the run goes on.
        """
        self._config = config
        self._settings = config.training
        self._output = Path(config.output)
        self.folder = self._output / "checkpoints"
        self._saved = resumed.step if resumed else 0
        self._resumed = resumed
        self._pending: PendingSave | None = None
        self._random: dict[str, Tensor] = {}
        self.check_lock: Callable[[], None] = lambda: None
        self._left_alone: set[str] = set()

    def maybe_save(self, model: Any) -> None:
        """Between two steps: completes what was written meanwhile, obeys signals, saves if it is time to.

        Collectives: two all-reduces of one number, and another while a save is in flight.

        Raises:
            StopRequested: on every rank.
            UserError, TransientError: on every rank: the output is another run's by now.
            UserError: a save failed, this one or the one in flight.
        """
        if self._resumed is not None:
            _restore_random_state(self._resumed)
            self._resumed = None
        self._random = capture_random_state()
        self._refuse_lost_lock()
        if self._pending is not None and not on_any_rank(not self._pending.written):
            self.wait()
        model.stop.raise_if_requested()
        steps, every = model.completed_steps, self._settings.checkpoint_every
        if every and steps > self._saved and steps % every == 0 and steps < self._settings.steps:
            self.save(model, name_of(steps))

    def after_step(self) -> None:
        """Remembers the random state: a validation may follow, and be cut short by a signal."""
        self._random = capture_random_state()

    def after_validation(self) -> None:
        """Puts the generators back where the last step left them."""
        if self._random:
            restore_random_state(self._random)

    def at_end(self) -> None:
        """After the last step: remembers the random state that `final` is to hold."""
        self._random = capture_random_state()

    def save(self, model: Any, name: str) -> Path:
        """Saves weights and training state after the last completed step, in the background if that is set.

        Raises:
            UserError: it, or the save in flight, failed; older checkpoints are as they were.
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
        self._pending = PendingSave(path, self._content(model), background=self._settings.async_save)
        self._saved = model.completed_steps
        if not self._settings.async_save:
            self.wait()
        return path

    def save_last_step(self, model: Any) -> None:
        """Saves the last completed step unless that has happened."""
        if model.completed_steps > self._saved:
            self.save(model, name_of(model.completed_steps))
        self.wait()

    def save_final(self, model: Any) -> Path:
        """Saves what the run ends with, and waits for it."""
        path = self.save(model, FINAL)
        self.wait()
        return path

    def wait(self) -> None:
        """Waits for the save in flight; then the pointer moves, and old checkpoints go."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._refuse_lost_lock()
        pending.finish()
        raise_on_all_ranks(
            f"checkpoint {pending.path}",
            lambda: self._tidy(pending.path) if dist.get_rank() == 0 else None,
            need="the right to replace older checkpoints",
            fix="free space, or set output",
        )
        logger.info("checkpoint %s", pending.path)

    def _refuse_lost_lock(self) -> None:
        """Ends all ranks if the output is another run's by now: one all-reduce of one number, as long as it is not."""
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
        """Metrics are on the disk before the checkpoint that counts on them."""
        metrics = self._output / FILE_NAME
        if metrics.is_file():
            flush_file(metrics)

    def _tidy(self, newest: Path) -> None:
        self.check_lock()
        update_latest(newest)
        settings = self._settings
        scores = read_metric(self._output, settings.best_metric) if settings.keep_best else {}
        found = Checkpoints.in_folder(self.folder)
        names = superfluous(
            found.complete,
            scores,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            greatest=settings.best_is == "max",
        )
        kept = dict.fromkeys(prune(self.folder, names), "it holds what no run wrote")
        for name, reason in (kept | {name: str(error.got) for name, error in found.damaged.items()}).items():
            if name not in self._left_alone:
                logger.warning("checkpoint %s is left alone: %s", self.folder / name, reason)
        self._left_alone |= kept.keys() | found.damaged.keys()

    def _content(self, model: Any) -> Content:
        return Content(
            models=model.student.chunks,
            architecture=model.architecture,
            config=to_dict_config(model.settings),
            step=model.completed_steps,
            base=model.base,
            adapters_only=model.student.adapters is not None,
            optimizer=model.optimizer.megatron,
            random_state=self._random,
            facts={"data": model.data_digest},
        )


def resume_optimizer(checkpoint: NemoCheckpoint, models: Any, optimizer: StudentOptimizer) -> None:
    """Puts optimizer and schedule where they were when `checkpoint` was written, whatever its layout."""
    optimizer.resume(load_training_state(checkpoint.directory, models, optimizer.megatron))


def _restore_random_state(checkpoint: NemoCheckpoint) -> None:
    """At the first boundary, not before: while Lightning sets up its loops it draws numbers.

    In another layout the generators start from the seed again: rollouts, data order and adapters do not depend on them.
    """
    if checkpoint.manifest["layout"] == layout():
        load_random_state(checkpoint.directory)
    else:
        logger.info("resuming in another layout than %s", checkpoint.manifest["layout"])
