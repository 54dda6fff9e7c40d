"""Checks before the first step that branches, alignment and loss are consistent."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from nemo_popsd.distillation import Target, hidden_pair
from nemo_popsd.megatron.forward import forward_backward, frozen_hidden_states, student_batches
from nemo_popsd.megatron.microbatches import ContextSequence, MicroBatch
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.distributed import all_reduce_max, device
from nemo_popsd.training.branches import TargetStates
from nemo_popsd.training.objective import LossReport, Objective

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""Largest loss per token and gradient norm that count as 0: GPU kernels may not be bitwise reproducible."""


def check_student_equals_base(
    student: Student,
    optimizer: StudentOptimizer,
    objective: Objective,
    sequences: Sequence[ContextSequence],
    token_budget: int,
    *,
    packed: bool = False,
) -> None:
    """Checks that loss and gradient are 0 if the student equals the base and the target is the base (no PMI).

    Runs forward and backward of the student and forward of the base on `sequences`, then clears the gradients.

    Args:
        student: the student before its first update.
        optimizer: the optimizer of the student.
        objective: the objective; its target is replaced by the base.
        sequences: some student contexts of the first step with their responses.
        token_budget: tokens of one forward and backward pass, including padding.
        packed: concatenate sequences instead of padding them.

    Raises:
        RuntimeError: loss or gradient is not 0; the message says what to check. Raised on every rank.
    """
    batches = student_batches(student.chunks, sequences, token_budget, packed=packed)
    with student.base.model() as base:
        # In training mode, like the student: a GPU may use an attention kernel with other rounding in evaluation mode.
        hidden = frozen_hidden_states(base, batches, training=True)
    base_target = Target(base=1.0, temperature=objective.target.temperature)
    base_objective = objective.with_target(base_target)
    states = [TargetStates(hidden_pair(base_target, base=state), None) for state in hidden]

    def loss(batch: MicroBatch, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
        lengths = dict(zip(batch.sequences, batch.response_lengths, strict=True))
        share = torch.full((sum(lengths.values()),), 1 / max(1, sum(lengths.values())), device=device())
        shares = [share[: lengths.get(row, 0)] for row in range(len(sequences))]
        return base_objective(batch, hidden_NH, states, shares)

    optimizer.zero_grad()
    reports = forward_backward(optimizer.chunks, batches, loss)
    grad_norm = optimizer.prepare()
    optimizer.zero_grad()
    # The 0 is for ranks without tokens: another stage computes the loss, or other ranks own all tokens.
    per_token = torch.cat([torch.zeros(1, device=device()), *(report.per_token for report in reports)])
    worst = all_reduce_max(float(per_token.abs().nan_to_num(nan=math.inf).max()))
    tolerance = TOLERANCE[next(student.chunks[0].parameters()).dtype]
    logger.info("self-check, base as target: largest loss per token %.3g, gradient norm %.3g", worst, grad_norm)
    if not (worst <= tolerance and grad_norm <= tolerance):
        raise RuntimeError(
            f"self-check failed: with the student equal to the base and the PMI off, the loss per token reaches "
            f"{worst:.3g} and the gradient norm is {grad_norm:.3g}; both must be 0 (at most {tolerance:g} in this "
            "precision). The student and the frozen base do not compute the same thing: check the layer spec, dropout, "
            "and that the base was not changed. Set training.self_check=false only to investigate."
        )
