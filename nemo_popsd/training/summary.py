"""From the ranks' reports to the step's metrics, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nemo_popsd.megatron.microbatches import TokenCount
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.observability.stopwatch import Stopwatch
from nemo_popsd.parallel.distributed import all_reduce_max, device
from nemo_popsd.training.objective import LossReport
from nemo_popsd.training.trajectory import Trajectory

_DECOMPOSITION = {"delta_ratio": "norm_ratio", "cos_total_it": "cosine_question", "cos_total_ref": "cosine_reference"}


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
    updates: int = 1,
) -> StepMetrics:
    """Means over the global batch. One all-reduce of eighteen numbers over the world, and one of one number.

    Every token must be reported by one rank of those that share it, and every trajectory by one of those that share
    its model; the others hand in nothing of it (see `Student.owns_loss` and `Student.owns_trajectories`).

    Args:
        reports: of this rank's micro-batches.
        trajectories: this rank's.
        weights_version: number of steps behind the weights that are trained.
        markers: epistemic markers in their responses.
        grad_norm: global gradient norm.
        learning_rate: of this step.
        stopwatch: with the phases ``rollout``, ``frozen`` and ``train`` of this step.
        computed: tokens that went through student and base for these trajectories.
        updates: optimizer updates that the loss is a mean over.
    """
    sums: dict[str, torch.Tensor | float] = {
        "loss": sum(float(report.loss) for report in reports),
        "tokens": sum(len(t.rollout.response) for t in trajectories),
        "responses": len(trajectories),
        "cut": sum(t.rollout.truncated for t in trajectories),
        "markers": markers,
        "ages": sum(t.rollout.token_ages(weights_version) for t in trajectories),
        "computed": computed.real + computed.padding,
        "padding": computed.padding,
    }
    for name in ("forward_kl", "reverse_kl", "student_entropy", "target_entropy"):
        sums[name] = sum(float(getattr(report.statistics, name).double().sum()) for report in reports)
    for name, statistic in _DECOMPOSITION.items():
        # A token on which student and teacher agree exactly has no direction: left out of the mean.
        values = [getattr(r.decomposition, statistic).double() for r in reports if r.decomposition is not None]
        finite = [value[value.isfinite()] for value in values]
        sums[name] = sum(float(value.sum()) for value in finite)
        sums[f"{name}_tokens"] = sum(len(value) for value in finite)
    totals = torch.tensor(list(map(float, sums.values())), dtype=torch.float64, device=device())
    dist.all_reduce(totals)
    oldest = all_reduce_max(max((t.rollout.age(weights_version) for t in trajectories), default=0))
    total = dict(zip(sums, totals.tolist(), strict=True))
    tokens = max(total["tokens"], 1.0)
    seconds = {phase: stopwatch.seconds(phase) for phase in ("rollout", "frozen", "train")}
    return StepMetrics(
        loss=total["loss"] / updates,
        forward_kl=total["forward_kl"] / tokens,
        reverse_kl=total["reverse_kl"] / tokens,
        student_entropy=total["student_entropy"] / tokens,
        target_entropy=total["target_entropy"] / tokens,
        **{n: total[n] / total[f"{n}_tokens"] if total[f"{n}_tokens"] else None for n in _DECOMPOSITION},
        response_tokens=total["tokens"] / max(total["responses"], 1.0),
        cut_share=total["cut"] / max(total["responses"], 1.0),
        marker_rate=1000 * total["markers"] / tokens,
        rollout_age=total["ages"] / tokens,
        rollout_age_max=oldest,
        padding_share=total["padding"] / max(total["computed"], 1.0),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens_per_second=total["tokens"] / max(sum(seconds.values()), 1e-9),
        seconds_rollout=seconds["rollout"],
        seconds_frozen=seconds["frozen"],
        seconds_train=seconds["train"],
    )
