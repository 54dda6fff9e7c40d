"""One on-policy step: rollouts, frozen branches, loss and gradients, updates, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.distillation.families import build_target
from nemo_popsd.megatron.forward import forward_backward, student_batches
from nemo_popsd.megatron.microbatches import MicroBatch, TokenCount
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.parallel.distributed import device
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import RolloutEngine, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.balance import rebalance
from nemo_popsd.training.branches import FrozenBranches, TargetStates
from nemo_popsd.training.guard import refuse_non_finite, refuse_non_finite_update
from nemo_popsd.training.objective import LossReport, Objective
from nemo_popsd.training.rollouts import StepRollouts, TrainingRows
from nemo_popsd.training.self_check import check_student_equals_base
from nemo_popsd.training.summary import summarize_step
from nemo_popsd.training.trajectory import Trajectory

_CHECKED_SEQUENCES = 4


class OnPolicyStep:
    """Carries out steps; the only state is what is being drawn for the next one (`rollout.overlap`)."""

    def __init__(
        self,
        config: PopsdConfig,
        student: Student,
        engine: RolloutEngine,
        sampling: SamplingParams,
        count_markers: Callable[[Sequence[int]], int],
        *,
        store: RolloutStore | None = None,
        training_rows: TrainingRows | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        """Builds target, objective and branches.

        Args:
            config: the run.
            student: the model and its base.
            engine: draws rollouts from the student's live weights.
            sampling: how.
            count_markers: epistemic markers in the text of a response's token ids.
            store: see `StepRollouts`, as for the next two.
            training_rows: see there.
            stop: see there.
        """
        self._config = config
        self._student = student
        self._count_markers = count_markers
        self._rollouts = StepRollouts(
            config, student, engine, sampling, store=store, rows=training_rows, stop=stop or StopSignals()
        )
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
            NonFiniteError: on every rank, before the update, or after it if it left weights that are not finite.
            RuntimeError: the self-check before step 1 failed.
            StopRequested: on every rank, before anything was trained on.
            UserError: the rollouts could not be written.
        """
        settings, watch = self._config.training, Stopwatch()
        with watch.phase("rollout"):
            parts = rebalance(self._rollouts.of(number, rows), self._student.dp_group, settings.updates_per_step)
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
                refuse_non_finite_update(number, optimizer.trained, optimizer.learning_rate)
                reports += reported
        counted = trajectories if self._student.counts else []
        return summarize_step(
            reports if self._student.reports else [],
            counted,
            weights_version=number - 1,
            markers=sum(self._count_markers(t.rollout.response) for t in counted),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            stopwatch=watch,
            computed=computed if self._student.counts else TokenCount(),
            updates=settings.updates_per_step,
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
