"""The metrics of a step from the reports of all ranks, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

import torch
import torch.distributed as dist

from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS
from nemo_popsd.megatron.microbatches import TokenCount
from nemo_popsd.observability.metrics import DECLARED, CostMetrics, MismatchMetrics, StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.objective import LossReport
from nemo_popsd.training.repetition import repeated_tokens
from nemo_popsd.training.siblings import SiblingSums
from nemo_popsd.training.trajectory import Trajectory

_PHASES = ("rollout", "frozen", "train")


def summarize_step(
    reports: Sequence[LossReport],
    trajectories: Sequence[Trajectory],
    *,
    weights_version: int,
    markers: int,
    grad_norm: float,
    learning_rate: float,
    stopwatch: Stopwatch,
    computed: TokenCount,
    frozen: TokenCount | None = None,
    siblings: SiblingSums | None = None,
    updates: int = 1,
    mismatch: MismatchMetrics | None = None,
    seconds_waiting: float = 0.0,
    seconds_weights: float = 0.0,
) -> StepMetrics:
    """Computes means over the global batch.

    Two all-reduces over the world: one of all sums, one of six maxima. One host synchronization for the sums of this
    rank, for any number of micro-batches and sequences.

    Of the ranks that share a token, exactly one must report it; of the ranks that share a model, exactly one must pass
    its trajectories (see `Student.owns_loss` and `Student.owns_trajectories`).

    Args:
        reports: reports of this rank's micro-batches.
        trajectories: trajectories of this rank.
        weights_version: number of steps that produced the current weights.
        markers: number of epistemic markers in the responses.
        grad_norm: global gradient norm.
        learning_rate: learning rate of this step.
        stopwatch: stopwatch with the phases ``rollout``, ``frozen`` and ``train`` of this step.
        computed: tokens that student and frozen branches computed for these trajectories.
        frozen: the part of these tokens that the frozen branches computed; None counts none.
        siblings: sums over this rank's questions; None on all ranks if each question has one response.
        updates: number of optimizer updates over which the loss is averaged.
        mismatch: mismatch of the step, the same on every rank.
        seconds_waiting: seconds that this rank waited for other replicas' rollouts.
        seconds_weights: seconds of this replica's transfer of weights to a server; 0 without a transfer.
    """
    frozen = frozen or TokenCount()
    sums: dict[str, float] = {
        **_sums_over_tokens(reports),
        "tokens": sum(len(t.rollout.response) for t in trajectories),
        "responses": len(trajectories),
        "cut": sum(t.rollout.truncated for t in trajectories),
        "verified": sum(t.right is not None for t in trajectories),
        "right": sum(t.right is True for t in trajectories),
        "markers": markers,
        "repeated": sum(repeated_tokens(t.rollout.response) for t in trajectories),
        "ages": sum(t.rollout.token_ages(weights_version) for t in trajectories),
        "computed": computed.real + computed.padding,
        "padding": computed.padding,
        "frozen": frozen.real,
        "saved": frozen.saved,
        **asdict(siblings or SiblingSums()),
    }
    totals = torch.tensor(list(map(float, sums.values())), dtype=torch.float64, device=device())
    dist.all_reduce(totals)
    peaks = [stopwatch.peak_bytes(phase) for phase in _PHASES]
    oldest, waiting, weights, *peaks_GiB = _maxima(
        [
            max((t.rollout.age(weights_version) for t in trajectories), default=0),
            seconds_waiting,
            seconds_weights,
            *(peak / 2**30 for peak in peaks),
        ]
    )
    total = dict(zip(sums, totals.tolist(), strict=True))
    tokens = max(total["tokens"], 1.0)
    seconds = {phase: stopwatch.seconds(phase) for phase in _PHASES}
    return StepMetrics(
        loss=total["loss"] / updates,
        statistics={
            name: total[f"sum of {name}"] / total[f"tokens with {name}"] if total[f"tokens with {name}"] else None
            for name in (statistic.name for statistic in DECLARED)
        },
        response_tokens=total["tokens"] / max(total["responses"], 1.0),
        cut_share=total["cut"] / max(total["responses"], 1.0),
        response_diversity=_ratio(total["distinct"], total["questions"]),
        accuracy=_ratio(total["right"], total["verified"]),
        accuracy_at_n=_ratio(total["solved"], total["graded_questions"]),
        weighted_share=total["counted"] / tokens,
        marker_rate=1000 * total["markers"] / tokens,
        repetition=total["repeated"] / tokens,
        rollout_age=total["ages"] / tokens,
        rollout_age_max=oldest,
        padding_share=total["padding"] / max(total["computed"], 1.0),
        frozen_tokens=total["frozen"],
        frozen_tokens_saved=total["saved"],
        frozen_saved_share=total["saved"] / max(total["frozen"] + total["saved"], 1.0),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens_per_second=total["tokens"] / max(sum(seconds.values()), 1e-9),
        seconds_rollout=seconds["rollout"],
        seconds_frozen=seconds["frozen"],
        seconds_train=seconds["train"],
        mismatch=mismatch,
        cost=CostMetrics(
            **{f"memory_{phase}": peak or None for phase, peak in zip(_PHASES, peaks_GiB, strict=True)},
            seconds_weights=weights or None,
            seconds_waiting=waiting,
        ),
    )


def _ratio(value: float, count: float) -> float | None:
    return value / count if count else None


def _maxima(own: Sequence[float]) -> list[float]:
    """The maximum of each number over the ranks. One all-reduce."""
    largest = torch.tensor(own, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return cast(list[float], largest.tolist())


def _sums_over_tokens(reports: Sequence[LossReport]) -> dict[str, float]:
    """This rank's loss, its number of tokens that count, and for each declared statistic the sum over tokens and their
    number.

    One transfer from the device. Tokens on which a statistic is undefined (student and teacher agree exactly, so there
    is no direction) are excluded.
    """
    names = ["loss", "counted"]
    for declared in DECLARED:
        names += [f"sum of {declared.name}", f"tokens with {declared.name}"]
    rows = []
    for report in reports:
        row = [report.loss.double(), report.counted.double()]
        for values, count in (
            (report.statistics, len(TOKEN_STATISTICS)),
            (report.decomposition, len(SIGNAL_STATISTICS)),
        ):
            if values is None:
                row += [row[0].new_zeros(())] * (2 * count)
                continue
            exact = values.values.double()
            is_defined = exact.isfinite()
            sums = torch.where(is_defined, exact, 0.0).sum(-1)
            row += torch.stack([sums, is_defined.sum(-1).double()], -1).flatten().unbind()
        rows.append(torch.stack(row))
    by_report = torch.stack(rows).tolist() if rows else []
    return {name: sum((values[i] for values in by_report), 0.0) for i, name in enumerate(names)}
