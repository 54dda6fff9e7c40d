"""Stops all ranks if a loss, gradient or weight is not finite, and names the rows whose loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from nemo_popsd.parallel.distributed import on_any_rank
from nemo_popsd.training.objective import LossReport


class NonFiniteError(RuntimeError):
    """NaN or Inf in a loss or gradient before the update, or in weights after it. Neither has been saved."""


def refuse_non_finite(step: int, reports: Sequence[LossReport], row_ids: Sequence[str], grad_norm: float) -> None:
    """Raises the same error on every rank if a loss on any rank, or the gradient norm, is not finite.

    One host synchronization. Collectives over the world: one all-reduce of one number, and one gather of names if a
    value is not finite.

    Args:
        step: index of the step, counted from 1.
        reports: reports of this rank's micro-batches; empty if another pipeline stage computes the loss.
        row_ids: ids of this rank's trajectories.
        grad_norm: global gradient norm.

    Raises:
        NonFiniteError: a value is not finite; the message names the step, the ranks and the rows.
    """
    bad = [row_ids[index] for index in _non_finite_sequences(reports)]
    if not on_any_rank(bool(bad) or not math.isfinite(grad_norm)):
        return
    by_rank: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, bad)
    named = "; ".join(f"rank {rank}: rows {', '.join(rows)}" for rank, rows in enumerate(by_rank) if rows)
    raise NonFiniteError(
        f"step {step}: got a loss or gradient that is NaN or Inf ({named or 'all losses are finite'}; gradient norm "
        f"{grad_norm}); no weight was changed; look at these rows, or set optimizer.lr lower or student.precision=fp32"
    )


def refuse_non_finite_update(step: int, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
    """Raises the same error on every rank if a weight on any rank is not finite after the update of a step.

    A finite gradient may cause a non-finite update, e.g. with a very large learning rate. Without this check, the last
    step of a run would save such weights, and an earlier step would be reported as an error in the next rows.

    Collective over the world: one all-reduce of one number.

    Args:
        step: index of the step, counted from 1.
        parameters: trained parameters.
        learning_rate: learning rate of the update.

    Raises:
        NonFiniteError: a weight is not finite; the message names the step and the learning rate.
    """
    if on_any_rank(non_finite(parameters)):
        raise NonFiniteError(
            f"step {step}: got weights that are NaN or Inf after the update with learning rate {learning_rate:g}; they "
            "were not saved; set optimizer.lr lower, optimizer.eps higher or student.precision=fp32, and start again: "
            "the run resumes from its newest checkpoint"
        )


def non_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether any number in `tensors` is NaN or Inf. One host synchronization."""
    finite = [torch.isfinite(tensor.detach()).all() for tensor in tensors]
    return bool(finite) and not bool(torch.stack(finite).all())


def _non_finite_sequences(reports: Sequence[LossReport]) -> list[int]:
    """Indices of the trajectories with a per-token loss that is NaN or Inf. One host synchronization."""
    if not reports:
        return []
    finite = torch.cat([torch.isfinite(report.per_token) for report in reports]).cpu()
    lengths = [length for report in reports for length in report.response_lengths]
    indices = [index for report in reports for index in report.rows]
    return [index for index, tokens in zip(indices, finite.split(lengths), strict=True) if not bool(tokens.all())]
