"""One on-policy step: rollouts of the current weights, frozen branches, loss and gradients, update, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.build import build_divergence, build_target
from nemo_popsd.errors import StopRequested
from nemo_popsd.megatron.forward import forward_backward
from nemo_popsd.megatron.microbatches import MicroBatch, microbatches
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, row_seed
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout
from nemo_popsd.runtime.agreement import do_together
from nemo_popsd.runtime.distributed import device, on_any_rank
from nemo_popsd.runtime.signals import StopSignals
from nemo_popsd.training.branches import FrozenBranches, TargetStates
from nemo_popsd.training.guard import refuse_non_finite
from nemo_popsd.training.objective import LossReport, Objective
from nemo_popsd.training.self_check import check_student_equals_base
from nemo_popsd.training.summary import summarize_step
from nemo_popsd.training.trajectory import Trajectory

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
            stop: asked after the rollouts, which a signal cuts short.
        """
        self._config = config
        self._student = student
        self._engine = engine
        self._sampling = sampling
        self._count_markers = count_markers
        self._store = store
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
        )
        self._branches = FrozenBranches(
            student.base,
            target,
            token_budget=config.training.frozen_tokens,
            diagnosed_tokens=settings.diagnosed_tokens,
        )

    def __call__(
        self, number: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Callable[[], None]
    ) -> StepMetrics:
        """Carries out step `number`. Collective over all ranks.

        Args:
            number: of the step, from 1.
            rows: this data-parallel rank's share of the step.
            optimizer: the student's.
            update: steps `optimizer`, through whatever counts steps.

        Raises:
            NonFiniteError: on every rank, before the update.
            RuntimeError: the self-check before step 1 failed.
            StopRequested: on every rank, before anything was trained on.
            UserError: the rollouts could not be written.
        """
        watch = Stopwatch()
        with watch.phase("rollout"):
            trajectories = self._roll_out(number, rows)
        if number == 1 and self._config.training.self_check:
            sequences = [t.student for t in trajectories[:_CHECKED_SEQUENCES]]
            budget = self._config.training.microbatch_tokens
            check_student_equals_base(self._student, optimizer, self._objective, sequences, budget)
        with watch.phase("frozen"):
            states = self._branches.target_states(trajectories)
        with watch.phase("train"):
            reports = self._accumulate(trajectories, states, optimizer)
            refuse_non_finite(number, reports, [t.row_id for t in trajectories], optimizer.prepare())
            update()
        return summarize_step(
            reports,
            trajectories,
            markers=sum(self._count_markers(t.rollout.response) for t in trajectories),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            stopwatch=watch,
            group=self._student.dp_group,
        )

    def _roll_out(self, number: int, rows: Sequence[PromptRow]) -> list[Trajectory]:
        requests = [
            Request(row.contexts.student, row_seed(self._config.seed, "train", number, row.record.id)) for row in rows
        ]
        rollouts = self._stored(number, rows, requests)
        if rollouts is None:
            try:
                rollouts = self._engine.generate(requests, self._sampling)
            except StopRequested:
                self._stop.request()
            self._stop.raise_if_requested()
            assert rollouts is not None
            self._write(number, rows, requests, rollouts)
        return [Trajectory(row, rollout) for row, rollout in zip(rows, rollouts, strict=True)]

    def _stored(self, number: int, rows: Sequence[PromptRow], requests: Sequence[Request]) -> list[Rollout] | None:
        """Rollouts of these rows by these weights from an attempt that was cut off, if every rank finds its own.

        Looks in the first step of a process alone.
        """
        if self._store is None or not self._may_be_stored:
            return None
        self._may_be_stored = False
        stored = self._store.complete(number, number - 1) or {}
        mine = [stored.get(row.record.id) for row in rows]
        fits = all(
            found is not None and (found.seed, found.prompt) == (request.seed, list(request.prompt))
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
        self, trajectories: Sequence[Trajectory], states: Sequence[TargetStates], optimizer: StudentOptimizer
    ) -> list[LossReport]:
        lengths = [len(t.rollout.response) for t in trajectories]
        weights = self._objective.token_weights(lengths, self._student.dp_group, device())
        budget = self._config.training.microbatch_tokens
        batches = microbatches([t.student for t in trajectories], budget, device())

        def loss(batch: MicroBatch, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
            return self._objective(batch, hidden_NH, states, weights)

        optimizer.zero_grad()
        return forward_backward(optimizer.model, batches, loss)
