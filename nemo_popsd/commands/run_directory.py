"""The output directory of a run: its files, and which of them a resumed run keeps.

.nemo_popsd     marks the directory as that of a run
config.yaml     resolved configuration of the last attempt
data.json       counts of the training rows
metrics.jsonl   one line per step and per evaluation
checkpoints/    step-000050, ..., final; the file `latest` names the newest
validation/     samples and scores of each evaluation: step-000000, ...
rollouts/       the rollouts of each step
diagnosis/      analyses before and after training
tensorboard/    events for TensorBoard
ranks/          how each rank of each attempt began and ended
vllm/           logs and model files of vLLM servers
huggingface/    export of the final weights
report.html     the report
DONE            the run is finished
REQUEUE         the run was requested to stop and has saved
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nemo_popsd.checkpoint.manifest import DamagedCheckpointError
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.retention import FINAL, LATEST, Checkpoints, is_name, prune
from nemo_popsd.config.loading import save_resolved
from nemo_popsd.config.resuming import DONE, REQUEUE, refuse_another_run, with_decisions
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.report import DataReport
from nemo_popsd.evaluation import records
from nemo_popsd.files.atomic import recover, remove_directory, remove_files, remove_partial_files, write_text
from nemo_popsd.files.output_lock import Hold, OutputLock
from nemo_popsd.files.ownership import CHECKPOINT, EXPORT, MARK, RUN, read_mark, refuse_foreign, write_mark
from nemo_popsd.model.evaluation import remove_validations_after
from nemo_popsd.observability import flight_recorder, jsonl_logger
from nemo_popsd.observability.jsonl_logger import keep_until, read_metric
from nemo_popsd.parallel.agreement import from_rank_zero, raise_on_all_ranks
from nemo_popsd.rollout import storage
from nemo_popsd.rollout.storage import RolloutStore

logger = logging.getLogger(__name__)

DATA = "data.json"
"""Counts of the training rows."""
_DIAGNOSIS = ("summary.json", "rollouts.jsonl", "index.html", MARK)
_FILES = (
    (f"{storage.FOLDER}/step-*", storage.FILES),
    (storage.FOLDER, ()),
    ("validation/step-*", (*records.FILES, MARK)),
    ("validation", ()),
    ("diagnosis/before", _DIAGNOSIS),
    ("diagnosis/after", _DIAGNOSIS),
    ("diagnosis", ()),
    ("tensorboard", ("events.out.tfevents.*", "hparams.yaml")),
    ("vllm/model-*", ("*",)),
    ("vllm", ("server-*.log",)),
    (flight_recorder.FOLDER, flight_recorder.FILES),
    (".", (jsonl_logger.FILE_NAME, DATA, "report.html", DONE, REQUEUE)),
)
"""Files that a run writes besides checkpoints and its export: directories in `output`, and names of files in them.
`overwrite` removes only these files.
"""
_SPACE = {"need": "a directory that can be written", "fix": "set output"}


class RunDirectory:
    """The files in `output`; all ranks read them, and rank 0 writes them. All ranks call the methods together."""

    def __init__(self, config: PopsdConfig) -> None:
        """Store the configuration, without reading files."""
        self._config = config
        self.output = Path(config.output)
        self._checkpoints = self.output / "checkpoints"
        self._hold: Hold | None = None

    def share_lock(self, lock: OutputLock | None) -> None:
        """Share the lock that rank 0 holds with all ranks. Collective: one broadcast of an object."""
        box = [None if lock is None else lock.hold]
        dist.broadcast_object_list(box, src=0)
        self._hold = box[0]

    @property
    def attempt(self) -> str:
        """Token of the lock, equal on all ranks after `share_lock`; empty without a lock."""
        return "" if self._hold is None else self._hold.token

    def is_held(self) -> bool:
        """Whether the output still belongs to this run. May be called on any rank."""
        return self._hold is None or self._hold.is_held()

    def check_lock(self) -> None:
        """Refuse to write into an output that belongs to another run. May be called on any rank.

        Raises:
            UserError, TransientError: see `nemo_popsd.files.output_lock.Hold.check`.
        """
        if self._hold is not None:
            self._hold.check()

    def refuse_lost_lock(self) -> None:
        """Call `check_lock` on rank 0 and raise its error on all ranks. Collective: one gather of objects."""
        self._on_rank_zero(lambda: None)

    def checkpoint(self) -> NemoCheckpoint | None:
        """Return the newest complete checkpoint, verified against its manifest; None means to start at step 1.

        Removes incomplete checkpoints. With `overwrite`, reads nothing. An older damaged checkpoint is kept, with a
        warning.

        Raises:
            DamagedCheckpointError: the newest is damaged; the message explains how to resume from an earlier one.
            UserError: its run had other settings, or files that no run wrote have the name of a checkpoint.
        """
        if self._config.overwrite:
            return None
        checkpoints = from_rank_zero(f"output {self.output}", self._list_checkpoints, **_SPACE)
        name = None
        try:
            if (newest := checkpoints.newest()) is None:
                return None
            name = newest.name
            checkpoint = self._verified(name)
        except DamagedCheckpointError as error:
            damaged = name or next(name for name, other in checkpoints.damaged.items() if str(other) == str(error))
            raise self._with_fix(error, damaged, checkpoints) from None
        for older in checkpoints.damaged.values():
            logger.warning("%s is kept: %s", older.what, older.got)
        refuse_another_run(checkpoint.config, self._config)
        return checkpoint

    def decided(self, checkpoint: NemoCheckpoint | None) -> PopsdConfig:
        """Return the configuration with resolved `auto` values, see `with_decisions`; `begin` records it.

        Args:
            checkpoint: checkpoint from which the run resumes; None for a new run.
        """
        self._config = with_decisions(self._config, None if checkpoint is None else checkpoint.config)
        return self._config

    def begin(self, completed: int) -> None:
        """Prepare the directory for a run after step `completed`.

        Removes the files of an earlier attempt for later steps; with `overwrite`, all files that a run wrote.
        """
        self._on_rank_zero(lambda: self._begin(completed))

    def record_data(self, report: DataReport) -> None:
        """Record how many training rows were kept, truncated and dropped, for the report."""
        self._on_rank_zero(lambda: write_text(self.output / DATA, json.dumps(report.as_dict()) + "\n"))

    def is_validated(self, completed: int) -> bool:
        """Whether an attempt has finished the evaluation after step `completed`; equal on all ranks.

        Samples are scored before metrics are logged, so a killed attempt may leave scores without metrics. Collective:
        a gather and a broadcast of objects.
        """

        def finished() -> bool:
            logged = completed in read_metric(self.output, "validation/accuracy")
            return logged and records.validation_directory(str(self.output), completed).concluded

        return from_rank_zero(f"output {self.output}", finished, **_SPACE)

    def mark_finished(self, steps: int) -> None:
        """Mark the run as finished, so that the same command has nothing to do."""
        self._on_rank_zero(lambda: write_text(self.output / DONE, f"{steps}\n"))

    def mark_stopped(self, steps: int) -> None:
        """Mark the run as stopped, so that the batch system may start it again."""
        self._on_rank_zero(lambda: write_text(self.output / REQUEUE, f"{steps}\n"))

    def _list_checkpoints(self) -> Checkpoints:
        self.check_lock()
        recover(self._checkpoints, CHECKPOINT, is_name)
        refuse_foreign(self._checkpoints / FINAL, CHECKPOINT)
        return Checkpoints.in_folder(self._checkpoints)

    def _verified(self, name: str) -> NemoCheckpoint:
        """Open a checkpoint and verify it against its manifest. Collective: two gathers of objects.

        Raises:
            DamagedCheckpointError: on every rank.
        """
        opened: list[NemoCheckpoint] = []
        path = self._checkpoints / name
        raise_on_all_ranks(f"checkpoint {path}", lambda: opened.append(NemoCheckpoint(path)), **_SPACE)
        opened[0].verify()
        return opened[0]

    def _with_fix(
        self, error: DamagedCheckpointError, damaged: str, checkpoints: Checkpoints
    ) -> DamagedCheckpointError:
        """Return `error` with a fix that names the newest intact checkpoint, found by verification. Collective."""
        path = self._checkpoints / damaged
        aside = path.with_name(f"{damaged}.damaged")
        fix = f"copy it again, or move {self._checkpoints} away to begin at step 1: no other checkpoint is intact"
        for name in reversed(checkpoints.resumable()):
            if name == damaged:
                continue
            try:
                step = self._verified(name).step
            except DamagedCheckpointError:
                continue
            fix = (
                f"copy it again, or move it away: mv {shlex.quote(str(path))} {shlex.quote(str(aside))}; then the same "
                f"command resumes after step {step} from {self._checkpoints / name}, which is intact"
            )
            break
        return DamagedCheckpointError(error.what, got=error.got, need=error.need, fix=fix)

    def _begin(self, completed: int) -> None:
        if self._config.overwrite:
            self._remove_run()
        self.output.mkdir(parents=True, exist_ok=True)
        if read_mark(self.output) is None:
            write_mark(self.output, RUN)
        remove_partial_files(self.output)
        for name in (DONE, REQUEUE):
            (self.output / name).unlink(missing_ok=True)
        keep_until(self.output, completed)
        remove_validations_after(self.output, completed)
        RolloutStore(self.output).remove_after(completed + 1)
        save_resolved(self._config, self.output / "config.yaml")

    def _remove_run(self) -> None:
        recover(self._checkpoints, CHECKPOINT, is_name)
        if self._checkpoints.is_dir():
            names = sorted(path.name for path in self._checkpoints.iterdir() if is_name(path.name))
            for name in prune(self._checkpoints, names):
                logger.warning("%s has files that no run wrote and is kept", self._checkpoints / name)
        remove_files(self._checkpoints, (LATEST,))
        remove_directory(self.output / "huggingface", EXPORT)
        for pattern, names_of_files in _FILES:
            for folder in sorted(self.output.glob(pattern)) if pattern != "." else [self.output]:
                remove_files(folder, names_of_files)

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        def act() -> None:
            if dist.get_rank() == 0:
                self.check_lock()
                action()

        raise_on_all_ranks(f"output {self.output}", act, **_SPACE)
