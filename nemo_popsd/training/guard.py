"""Stops every rank when anything is not finite, before the update or right after it, and says where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from nemo_popsd.parallel.distributed import on_any_rank
from nemo_popsd.training.objective import LossReport


class NonFiniteError(RuntimeError):
    """NaN or Inf in a loss or gradient, before the update, or in weights, after it. Nothing was saved since."""


def refuse_non_finite(step: int, reports: Sequence[LossReport], row_ids: Sequence[str], grad_norm: float) -> None:
    """Raises the same error on every rank if any rank has a loss, or the gradient norm is, not finite.

    Collectives over the world: one all-reduce of one number, and one gather of names if something is wrong.

    Args:
        step: number of the step, from 1.
        reports: of this rank's micro-batches; none where another pipeline stage has the loss.
        row_ids: ids of this rank's trajectories.
        grad_norm: global gradient norm.

    Raises:
        NonFiniteError: naming the step, the ranks and the rows.
    """
    bad = [row_ids[row] for report in reports for row in _non_finite_rows(report)]
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
    """Raises the same error on every rank if the update of a step left weights on any that are not finite.

    A gradient may be finite and its update not, as with a learning rate beyond all sense. Without this the last step
    of a run would save such weights, and any other would be blamed on the rows of the next.

    Collective over the world: one all-reduce of one number.

    Args:
        step: number of the step, from 1.
        parameters: what is trained.
        learning_rate: of the update.

    Raises:
        NonFiniteError: naming the step and the learning rate.
    """
    if on_any_rank(non_finite(parameters)):
        raise NonFiniteError(
            f"step {step}: got weights that are NaN or Inf after the update with learning rate {learning_rate:g}; they "
            "were not saved; set optimizer.lr lower, optimizer.eps higher or student.precision=fp32, and start again: "
            "the run resumes from its newest checkpoint"
        )


def non_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether any number in `tensors` is NaN or Inf. The host waits once for the device."""
    found = [torch.isfinite(tensor.detach()).all() for tensor in tensors]
    return bool(found) and not bool(torch.stack(found).all())


def _non_finite_rows(report: LossReport) -> list[int]:
    finite = torch.isfinite(report.per_token).split(report.response_lengths)
    return [row for row, tokens in zip(report.rows, finite, strict=True) if not bool(tokens.all())]
