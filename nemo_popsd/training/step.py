"""One training step: rollouts, frozen branches, loss and gradients, updates, metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.distillation.gates import build_gates
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.megatron.forward import forward_backward, student_batches
from nemo_popsd.megatron.fp8 import in_fp8
from nemo_popsd.megatron.microbatches import MicroBatch, TokenCount
from nemo_popsd.megatron.moving import BranchWeights
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.balance import rebalance
from nemo_popsd.training.branches import FrozenBranches, TargetStates
from nemo_popsd.training.config import TrainingConfig
from nemo_popsd.training.guard import refuse_non_finite, refuse_non_finite_update
from nemo_popsd.training.mismatch import MismatchGuard
from nemo_popsd.training.objective import LossReport, Objective
from nemo_popsd.training.reading import ResponseReader, verified
from nemo_popsd.training.rollouts import TrajectorySource
from nemo_popsd.training.self_check import check_student_equals_base
from nemo_popsd.training.siblings import SiblingSums, sibling_sums
from nemo_popsd.training.summary import summarize_step
from nemo_popsd.training.trajectory import Trajectory
from nemo_popsd.training.weights import response_weights, shares

logger = logging.getLogger(__name__)

_CHECKED_SEQUENCES = 4


class OnPolicyStep:
    """Runs training steps. Its only state is in `rollouts` (responses for the next step) and in `weights`.

    Attributes:
        weights: weights of the frozen branches; copies that follow the student are part of a checkpoint.
    """

    def __init__(
        self,
        training: TrainingConfig,
        distillation: DistillationConfig,
        student: Student,
        rollouts: TrajectorySource,
        reader: ResponseReader,
        weights: BranchWeights,
        mismatch: MismatchGuard | None = None,
        complete: Callable[[StepMetrics, Sequence[PromptRow]], StepMetrics] = lambda metrics, rows: metrics,
        *,
        share_prefixes: bool = False,
        stopwatch: Callable[[], Stopwatch] = Stopwatch,
    ) -> None:
        """Builds target, objective and frozen branches.

        Args:
            training: batches and updates.
            distillation: target and loss.
            student: the model and its base.
            rollouts: provides the trajectories of each step.
            reader: reads the text of responses.
            weights: weights of the frozen branches.
            mismatch: compares the log-probabilities of the rollouts with the student's; None omits the comparison.
            complete: adds metrics derived from those of a step and this rank's rows, without collectives.
            share_prefixes: whether the frozen branches compute each distinct prefix only once.
            stopwatch: creates the stopwatch of a step.
        """
        self._stopwatch = stopwatch
        self._training = training
        self._student = student
        self._rollouts = rollouts
        self._reader, self.weights = reader, weights
        self._tokens, self._loss_mean = distillation.tokens, distillation.loss_mean
        self._mismatch, self._complete, self._share_prefixes = mismatch, complete, share_prefixes
        target = build_target(distillation.target)
        self._objective = Objective(
            student,
            target,
            build_divergence(distillation.divergence),
            chunk_tokens=distillation.chunk_tokens,
            fused=distillation.fused,
            gates=build_gates(distillation.tokens),
            output=weights.output,
        )
        self._branches = FrozenBranches(
            weights.anchor,
            weights.teacher,
            target,
            token_budget=training.frozen_tokens,
            diagnosed_tokens=distillation.diagnosed_tokens,
            packed=training.packing,
            shared_cache_tokens=training.frozen_cache_tokens if share_prefixes else None,
            on_host=training.cache_on_host,
            fp8=student.fp8,
        )

    def __call__(
        self, step: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Callable[[], None]
    ) -> StepMetrics:
        """Runs one step. Collective over all ranks.

        Args:
            step: index of the step, counted from 1.
            rows: rows of this data-parallel rank.
            optimizer: optimizer of the student.
            update: steps `optimizer` and counts the update; called `training.updates_per_step` times.

        Raises:
            NonFiniteError: a loss or gradient before the update, or a weight after it, is not finite. Raised on every
                rank.
            RuntimeError: the self-check before step 1 failed.
            StopRequested: a signal requested a stop. Raised on every rank, before the first update.
            UserError: the rollouts could not be written, or their log-probabilities differ from the student's. The
                latter is raised on every rank, before the first update.
        """
        settings, watch = self._training, self._stopwatch()
        with watch.phase("rollout"):
            generated = verified(self._rollouts.of(step, rows), self._reader, self._student)
            siblings = self._siblings(generated)
            parts = rebalance(
                generated,
                self._student.dp_group,
                settings.updates_per_step,
                by_row=self._rollouts.per_prompt > 1,
                shared=self._share_prefixes,
            )
        trajectories = [trajectory for part in parts for trajectory in part]
        if step == 1 and settings.self_check:
            sequences = [t.student for t in trajectories[:_CHECKED_SEQUENCES]]
            budget, packed = settings.microbatch_tokens, settings.packing
            check_student_equals_base(self._student, optimizer, self._objective, sequences, budget, packed=packed)
        with watch.phase("frozen"):
            states = self._branches.target_states(trajectories)
        frozen, reports, mismatch = self._branches.computed, [], None
        computed = frozen
        with watch.phase("train"), in_fp8(self._student.chunks, self._student.fp8, "training"):
            for number, part in enumerate(parts, start=1):
                part_states, states = states[: len(part)], states[len(part) :]
                batches = student_batches(
                    self._student.chunks,
                    [t.student for t in part],
                    settings.microbatch_tokens,
                    packed=settings.packing,
                )
                computed += TokenCount.of(batches)
                reported = self._accumulate(part, batches, part_states, optimizer)
                refuse_non_finite(step, reported, [t.row_id for t in part], optimizer.prepare())
                if number == 1 and self._mismatch is not None:
                    mismatch = self._mismatch(step, reported if self._student.owns_loss else [], part)
                optimizer.update_follows = number < len(parts)
                update()
                refuse_non_finite_update(step, optimizer.trained, optimizer.learning_rate)
                reports += reported
        self.weights.follow(step)
        counted = trajectories if self._student.owns_trajectories else []
        metrics = summarize_step(
            reports if self._student.owns_loss else [],
            counted,
            weights_version=step - 1,
            markers=sum(self._reader.count_markers(t.rollout.response) for t in counted),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            stopwatch=watch,
            computed=computed if self._student.owns_trajectories else TokenCount(),
            siblings=siblings,
            frozen=frozen if self._student.owns_trajectories else TokenCount(),
            updates=settings.updates_per_step,
            mismatch=mismatch,
            seconds_waiting=self._rollouts.seconds_waiting,
            seconds_weights=self._rollouts.seconds_weights,
        )
        if metrics.weighted_share == 0:
            logger.warning("step %d: no token has a weight (distillation.tokens), so the loss is 0", step)
        return self._complete(metrics, rows)

    def _siblings(self, trajectories: Sequence[Trajectory]) -> SiblingSums | None:
        """Sums over the questions of this rank's replica; None if each question has one response."""
        if self._rollouts.per_prompt == 1:
            return None
        return sibling_sums(trajectories if self._student.owns_trajectories else [])

    def _accumulate(
        self,
        trajectories: Sequence[Trajectory],
        batches: Sequence[MicroBatch],
        states: Sequence[TargetStates],
        optimizer: StudentOptimizer,
    ) -> list[LossReport]:
        weights = [response_weights(t, self._tokens, self._reader.marked) for t in trajectories]
        of_tokens = shares(weights, self._loss_mean, self._student.dp_group, device())
        split = self._student.split
        owned = [
            share[split.owned(t.rollout.response)].float() for t, share in zip(trajectories, of_tokens, strict=True)
        ]
        on_device = torch.cat([torch.zeros(0), *owned]).to(device()).split([0, *map(len, owned)])[1:]

        def loss(batch: MicroBatch, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
            return self._objective(batch, hidden_NH, states, on_device)

        optimizer.zero_grad()
        return forward_backward(optimizer.chunks, batches, loss)
