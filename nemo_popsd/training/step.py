"""One on-policy step: rollouts of the current weights, frozen branches, loss and gradients, updates, metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.build import build_divergence, build_target
from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.megatron.forward import forward_backward, student_batches
from nemo_popsd.megatron.microbatches import MicroBatch, TokenCount
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, row_seed
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout
from nemo_popsd.runtime.agreement import do_together
from nemo_popsd.runtime.distributed import device, on_any_rank
from nemo_popsd.runtime.signals import StopSignals
from nemo_popsd.training.balance import share_out
from nemo_popsd.training.branches import FrozenBranches, TargetStates
from nemo_popsd.training.guard import refuse_non_finite
from nemo_popsd.training.objective import LossReport, Objective
from nemo_popsd.training.self_check import check_student_equals_base
from nemo_popsd.training.summary import summarize_step
from nemo_popsd.training.trajectory import Trajectory

logger = logging.getLogger(__name__)

_CHECKED_SEQUENCES = 4


class OnPolicyStep:
    """Carries out steps; holds no state but references."""

    def __init__(
        self,
        config: PopsdConfig,
        student: Student,
        engine: RolloutEngine,
        sampling: SamplingParams,
        count_markers: Callable[[Sequence[int]], int],
        *,
        store: RolloutStore | None = None,
        find_row: Callable[[str], PromptRow] | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        """Builds target, objective and branches.

        Args:
            config: the run.
            student: the model and its base.
            engine: draws rollouts from the student's live weights.
            sampling: how.
            count_markers: epistemic markers in the text of a response's token ids.
            store: where rollouts are put before they are trained on; None keeps them in memory alone.
            find_row: a training row by its id, for those that a step leaves to the next; needed, as `store` is, with
                `rollout.tokens_per_step`.
            stop: asked after the rollouts, which a signal cuts short.
        """
        self._config = config
        self._student = student
        self._engine = engine
        self._sampling = sampling
        self._count_markers = count_markers
        self._store = store
        self._find_row = find_row
        self._stop = stop or StopSignals()
        self._may_be_stored = store is not None
        settings = config.distillation
        target = build_target(settings.target)
        self._objective = Objective(
            student,
            target,
            build_divergence(settings.divergence),
            loss_mean=settings.loss_mean,
            chunk_tokens=settings.chunk_tokens,
            fused=settings.fused,
        )
        self._branches = FrozenBranches(
            student.base,
            target,
            token_budget=config.training.frozen_tokens,
            diagnosed_tokens=settings.diagnosed_tokens,
            soft_cap=student.soft_cap,
            packed=config.training.packing,
            on_host=config.training.cache_on_host,
        )

    def __call__(
        self, number: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Callable[[], None]
    ) -> StepMetrics:
        """Carries out step `number`. Collective over all ranks.

        Args:
            number: of the step, from 1.
            rows: this data-parallel rank's share of the step.
            optimizer: the student's.
            update: steps `optimizer`, through whatever counts updates; called `training.updates_per_step` times.

        Raises:
            NonFiniteError: on every rank, before the update.
            RuntimeError: the self-check before step 1 failed.
            StopRequested: on every rank, before anything was trained on.
            UserError: the rollouts could not be written.
        """
        settings, watch = self._config.training, Stopwatch()
        with watch.phase("rollout"):
            parts = share_out(self._roll_out(number, rows), self._student.dp_group, settings.updates_per_step)
        trajectories = [trajectory for part in parts for trajectory in part]
        if number == 1 and settings.self_check:
            sequences = [t.student for t in trajectories[:_CHECKED_SEQUENCES]]
            budget, packed = settings.microbatch_tokens, settings.packing
            check_student_equals_base(self._student, optimizer, self._objective, sequences, budget, packed=packed)
        with watch.phase("frozen"):
            states = self._branches.target_states(trajectories)
        computed, reports = self._branches.computed, []
        with watch.phase("train"):
            for part in parts:
                of_part, states = states[: len(part)], states[len(part) :]
                batches = student_batches(
                    self._student.chunks,
                    [t.student for t in part],
                    settings.microbatch_tokens,
                    packed=settings.packing,
                )
                computed += TokenCount.of(batches)
                reported = self._accumulate(part, batches, of_part, optimizer)
                refuse_non_finite(number, reported, [t.row_id for t in part], optimizer.prepare())
                update()
                reports += reported
        counted = trajectories if self._student.counts else []
        return summarize_step(
            reports if self._student.reports else [],
            counted,
            markers=sum(self._count_markers(t.rollout.response) for t in counted),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            stopwatch=watch,
            computed=computed if self._student.counts else TokenCount(),
            updates=settings.updates_per_step,
        )

    def _roll_out(self, number: int, rows: Sequence[PromptRow]) -> list[Trajectory]:
        """Trajectories of the rows that ended, those of the step before included that it had left."""
        requests = [
            Request(row.contexts.student, row_seed(self._config.seed, "train", number, row.record.id)) for row in rows
        ]
        earlier_rows, earlier = self._left_by(number - 1)
        rows, requests = [*earlier_rows, *rows], [*earlier, *requests]
        rollouts = self._stored(number, rows, requests)
        if rollouts is None:
            try:
                rollouts = self._engine.generate(requests, replace(self._sampling, token_budget=self._budget(number)))
            except StopRequested:
                self._stop.request()
            self._stop.raise_if_requested()
            assert rollouts is not None
            self._write(number, rows, requests, rollouts)
        left = sum(rollout.unfinished for rollout in rollouts)
        if left:
            logger.info("step %d leaves %d of this replica's %d rows to the next one", number, left, len(rows))
        ended = [(row, rollout) for row, rollout in zip(rows, rollouts, strict=True) if not rollout.unfinished]
        return [Trajectory(row, rollout) for row, rollout in ended]

    def _budget(self, number: int) -> int:
        """Tokens of this replica in step `number`; 0 for all rows to end."""
        if number == self._config.training.steps:
            return 0
        return -(-self._config.rollout.tokens_per_step // self._student.dp_group.size())

    def _left_by(self, number: int) -> tuple[list[PromptRow], list[Request]]:
        """This replica's share of the rows that step `number` left, and the requests that go on with them."""
        if not self._config.rollout.tokens_per_step or number == 0:
            return [], []
        assert self._store is not None
        assert self._find_row is not None
        left = self._store.unfinished(number)
        if on_any_rank(left is None):
            raise UserError(
                "rollouts",
                got=f"not all of step {number}'s in {self._store.folder}",
                need="them, since rows that the step left wait there (rollout.tokens_per_step)",
                mend="bring them back, or set output for another run",
            )
        assert left is not None
        mine = left[self._student.dp_group.rank() :: self._student.dp_group.size()]
        requests = [Request(stored.prompt, stored.seed, stored.rollout) for stored in mine]
        return [self._find_row(stored.row_id) for stored in mine], requests

    def _stored(self, number: int, rows: Sequence[PromptRow], requests: Sequence[Request]) -> list[Rollout] | None:
        """Rollouts of these rows by these weights from an attempt that was cut off, if every rank finds its own.

        Looks in the first step of a process alone.
        """
        if self._store is None or not self._may_be_stored:
            return None
        self._may_be_stored = False
        stored = self._store.complete(number, number - 1) or {}
        mine = [stored.get((row.record.id, request.seed)) for row, request in zip(rows, requests, strict=True)]
        fits = all(
            found is not None and found.prompt == list(request.prompt)
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
            if self._student.is_first_of_replica:
                store.write(number, lines, part=group.rank(), parts=group.size())

        do_together(
            f"rollouts of step {number}",
            write,
            need="room and the right to write them; nothing was trained on them yet",
            mend="free space, set output elsewhere, or set rollout.save=false",
        )

    def _accumulate(
        self,
        trajectories: Sequence[Trajectory],
        batches: Sequence[MicroBatch],
        states: Sequence[TargetStates],
        optimizer: StudentOptimizer,
    ) -> list[LossReport]:
        lengths = [len(t.rollout.response) for t in trajectories]
        weights = self._objective.token_weights(lengths, self._student.dp_group, device())

        def loss(batch: MicroBatch, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
            return self._objective(batch, hidden_NH, states, weights)

        optimizer.zero_grad()
        return forward_backward(optimizer.chunks, batches, loss)
