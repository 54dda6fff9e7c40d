"""One training step: rollouts, frozen branches, loss and gradients, updates, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.distillation.divergence import build_divergence
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.megatron.forward import forward_backward, student_batches
from nemo_popsd.megatron.microbatches import MicroBatch, TokenCount
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.balance import rebalance
from nemo_popsd.training.branches import FrozenBranches, TargetStates
from nemo_popsd.training.config import TrainingConfig
from nemo_popsd.training.guard import refuse_non_finite, refuse_non_finite_update
from nemo_popsd.training.objective import LossReport, Objective
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.self_check import check_student_equals_base
from nemo_popsd.training.siblings import SiblingSums, sibling_sums
from nemo_popsd.training.summary import summarize_step
from nemo_popsd.training.trajectory import Trajectory

_CHECKED_SEQUENCES = 4


class OnPolicyStep:
    """Carries out training steps. Its only state is in `rollouts`: what is being generated for the next step."""

    def __init__(
        self,
        training: TrainingConfig,
        distillation: DistillationConfig,
        student: Student,
        rollouts: StepRollouts,
        count_markers: Callable[[Sequence[int]], int],
        *,
        share_prefixes: bool = False,
        is_right: Callable[[Sequence[int], str], bool] | None = None,
    ) -> None:
        """Builds target, objective and frozen branches.

        Args:
            training: batches and updates.
            distillation: target and loss.
            student: the model and its base.
            rollouts: where each step gets its trajectories.
            count_markers: number of epistemic markers in the text of a response's token ids.
            share_prefixes: the frozen branches compute each distinct prefix once.
            is_right: whether a response ends in the expected answer; grades several responses to a question.
        """
        self._training = training
        self._student = student
        self._rollouts = rollouts
        self._count_markers = count_markers
        self._share_prefixes, self._is_right = share_prefixes, is_right
        target = build_target(distillation.target)
        self._objective = Objective(
            student,
            target,
            build_divergence(distillation.divergence),
            loss_mean=distillation.loss_mean,
            chunk_tokens=distillation.chunk_tokens,
            fused=distillation.fused,
        )
        self._branches = FrozenBranches(
            student.base,
            target,
            token_budget=training.frozen_tokens,
            diagnosed_tokens=distillation.diagnosed_tokens,
            packed=training.packing,
            shared_cache_tokens=training.frozen_cache_tokens if share_prefixes else None,
            on_host=training.cache_on_host,
        )

    def __call__(
        self, step: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Callable[[], None]
    ) -> StepMetrics:
        """Carries out one step. Collective over all ranks.

        Args:
            step: index of the step, counted from 1.
            rows: of this data-parallel rank.
            optimizer: of the student.
            update: steps `optimizer` and counts the update; called `training.updates_per_step` times.

        Raises:
            NonFiniteError: on every rank, before the update, or after it if a weight is not finite.
            RuntimeError: the self-check before step 1 failed.
            StopRequested: on every rank, before anything was trained on.
            UserError: the rollouts could not be written.
        """
        settings, watch = self._training, Stopwatch()
        with watch.phase("rollout"):
            generated = self._rollouts.of(step, rows)
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
        frozen, reports = self._branches.computed, []
        computed = frozen
        with watch.phase("train"):
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
                optimizer.update_follows = number < len(parts)
                update()
                refuse_non_finite_update(step, optimizer.trained, optimizer.learning_rate)
                reports += reported
        counted = trajectories if self._student.owns_trajectories else []
        return summarize_step(
            reports if self._student.owns_loss else [],
            counted,
            weights_version=step - 1,
            markers=sum(self._count_markers(t.rollout.response) for t in counted),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            stopwatch=watch,
            computed=computed if self._student.owns_trajectories else TokenCount(),
            siblings=siblings,
            frozen=frozen if self._student.owns_trajectories else TokenCount(),
            updates=settings.updates_per_step,
        )

    def _siblings(self, trajectories: Sequence[Trajectory]) -> SiblingSums | None:
        """Of the questions that this rank's replica generated responses to; None with one response to each."""
        if self._rollouts.per_prompt == 1:
            return None
        return sibling_sums(trajectories if self._student.owns_trajectories else [], self._is_right)

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
