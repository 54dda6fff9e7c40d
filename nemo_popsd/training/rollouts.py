"""Which responses a step trains on: drawn now, drawn ahead, left by the step before, or kept from an attempt.

Every response is drawn by weights of the run's own past. How far that past may lie back is `rollout.max_age`; what an
older prefix does to the objective is in docs/staleness.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.distributed import all_reduce_max, on_any_rank
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.parallel.waiting import wait_for_all
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.rollout.engine import (
    ConcurrentEngine,
    PendingRollouts,
    Request,
    Rollout,
    RolloutEngine,
    SamplingParams,
    row_seed,
)
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout
from nemo_popsd.training.trajectory import Trajectory

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingRows:
    """Access to the rows that are trained on."""

    by_id: Callable[[str], PromptRow]
    """One of them."""
    of_step: Callable[[int], list[PromptRow]]
    """This data-parallel rank's share of a step, counted from 1."""


@dataclass(frozen=True)
class _Ahead:
    """What is being drawn for a step to come."""

    step: int
    requests: list[Request]
    drawing: PendingRollouts


class StepRollouts:
    """Gives each step its trajectories, and keeps them on disk. All ranks call its methods together.

    The weights are those of step - 1 while a step asks, and each response tells which weights drew it.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        student: Student,
        engine: RolloutEngine,
        sampling: SamplingParams,
        *,
        seed: int,
        last_step: int,
        store: RolloutStore | None,
        rows: TrainingRows | None,
        stop: StopSignals,
    ) -> None:
        """Keeps references only.

        Args:
            settings: token budget, overlap and age limit.
            student: for its position among the ranks.
            engine: generates from the student's live weights; a `ConcurrentEngine` for `rollout.overlap`.
            sampling: how tokens are sampled.
            seed: seed of the run.
            last_step: `training.steps`; the last step leaves no response unfinished.
            store: where rollouts are written before they are trained on; None keeps them in memory only.
            rows: required with `rollout.overlap` and, as `store` is, with `rollout.tokens_per_step`.
            stop: checked after the rollouts, which a signal interrupts.
        """
        self._seed = seed
        self._settings = settings
        self._last_step = last_step
        self._student = student
        self._engine = engine
        self._sampling = sampling
        self._store = store
        self._rows = rows
        self._stop = stop
        self._may_be_stored = store is not None
        self._ahead: _Ahead | None = None

    def of(self, number: int, rows: Sequence[PromptRow]) -> list[Trajectory]:
        """Trajectories of step `number`: of its rows that ended, and of those that the step before had left.

        With `rollout.overlap`, what the next step will train on begins to be drawn, by the weights as they are now.

        Raises:
            StopRequested: on every rank, before anything was trained on.
            UserError: the rollouts could not be drawn or written, or those of the step before are gone.
        """
        begun_rows, begun = self._left_by(number - 1)
        rows, requests = [*begun_rows, *rows], [*begun, *self._requests(number, rows)]
        rollouts = self._stored(number, rows, requests)
        if rollouts is None:
            rollouts = self._unless_stopped(lambda: self._drawn(number, requests))
            self._write(number, rows, requests, rollouts)
        if self._settings.overlap and number < self._last_step:
            self._unless_stopped(lambda: self._draw_ahead(number + 1))
        left = sum(rollout.unfinished for rollout in rollouts)
        if left:
            logger.info("step %d leaves %d of this replica's %d rows to the next one", number, left, len(rows))
        ended = [(row, rollout) for row, rollout in zip(rows, rollouts, strict=True) if not rollout.unfinished]
        oldest = int(all_reduce_max(max((rollout.age(number - 1) for _, rollout in ended), default=0)))
        if oldest > self._settings.age_bound:
            raise RuntimeError(f"step {number} has rollouts by weights that are {oldest} steps old")
        return [Trajectory(row, rollout) for row, rollout in ended]

    def _requests(self, number: int, rows: Sequence[PromptRow]) -> list[Request]:
        return [Request(row.contexts.student, row_seed(self._seed, "train", number, row.record.id)) for row in rows]

    def _drawn(self, number: int, requests: Sequence[Request]) -> list[Rollout]:
        """By the engine: asked now, or in the step before."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._engine.generate(requests, replace(self._sampling, token_budget=self._budget(number)))
        assert (ahead.step, ahead.requests) == (number, requests), "other rows than were foretold"
        return ahead.drawing.result()

    def _draw_ahead(self, number: int) -> None:
        assert isinstance(self._engine, ConcurrentEngine)
        assert self._rows is not None
        requests = self._requests(number, self._rows.of_step(number))
        self._ahead = _Ahead(number, requests, self._engine.begin(requests, self._sampling))

    def _unless_stopped(self, action: Callable[[], T]) -> T:
        """What `action` returns, if no rank was asked to stop meanwhile."""
        result: T | None = None
        try:
            result = action()
        except StopRequested:  # on the ranks of this model, but not yet on others
            self._stop.request()
        wait_for_all()  # replicas draw for unequally long
        self._stop.raise_if_requested()
        return cast(T, result)

    def _budget(self, number: int) -> int:
        """Tokens of this replica in step `number`; 0 for all rows to end."""
        if number == self._last_step:
            return 0
        return -(-self._settings.tokens_per_step // self._student.dp_group.size())

    def _left_by(self, number: int) -> tuple[list[PromptRow], list[Request]]:
        """This replica's share of the rows that step `number` left, and the requests that go on with them."""
        if not self._settings.tokens_per_step or number == 0:
            return [], []
        assert self._store is not None
        assert self._rows is not None
        left = self._store.unfinished(number)
        if on_any_rank(left is None):
            raise UserError(
                "rollouts",
                got=f"not all of step {number}'s in {self._store.folder}",
                need="them, since rows that the step left wait there (rollout.tokens_per_step)",
                fix="bring them back, or set output for another run",
            )
        assert left is not None
        mine = left[self._student.dp_group.rank() :: self._student.dp_group.size()]
        rows = self._rows
        return [rows.by_id(stored.row_id) for stored in mine], [self._going_on(stored, number) for stored in mine]

    def _going_on(self, left: StoredRollout, number: int) -> Request:
        """The request that goes on with a row that step `number` left.

        It ends now if waiting again would make it too old, or if it waited without having been begun.
        """
        old = left.rollout.age(number + 1) > self._settings.age_bound
        return Request(left.prompt, left.seed, left.rollout, run_to_end=old or not left.rollout.response)

    def _stored(self, number: int, rows: Sequence[PromptRow], requests: Sequence[Request]) -> list[Rollout] | None:
        """Rollouts of these rows from an attempt that was cut off, if every rank finds its own, young enough.

        Looks in the first step of a process alone.
        """
        if self._store is None or not self._may_be_stored:
            return None
        self._may_be_stored = False
        bound = self._settings.age_bound
        stored = self._store.complete(number, range(number - 1 - bound, number)) or {}
        mine = [stored.get((row.record.id, request.seed)) for row, request in zip(rows, requests, strict=True)]
        fits = all(
            found is not None and found.prompt == list(request.prompt) and found.rollout.age(number - 1) <= bound
            for found, request in zip(mine, requests, strict=True)
        )
        return None if on_any_rank(not fits) else [found.rollout for found in mine if found is not None]

    def _write(
        self, number: int, rows: Sequence[PromptRow], requests: Sequence[Request], rollouts: Sequence[Rollout]
    ) -> None:
        if self._store is None:
            return
        store, group = self._store, self._student.dp_group
        lines = [
            StoredRollout(row.record.id, request.seed, list(request.prompt), rollout)
            for row, request, rollout in zip(rows, requests, rollouts, strict=True)
        ]

        def write() -> None:
            if self._student.is_replica_leader:
                store.write(number, lines, part=group.rank(), parts=group.size())

        raise_on_all_ranks(
            f"rollouts of step {number}",
            write,
            need="room and the right to write them; nothing was trained on them yet",
            fix="free space, set output elsewhere, or set rollout.save=false",
        )
