"""Compares the log-probabilities of the sampled tokens in the rollout engine and in the trainer.

On-policy training assumes that they agree up to rounding. The engine reports the log-probability of every sampled
token; the trainer's are from the student's first forward pass of the step. Both refer to the model itself, at
temperature 1 and without filters. With Δ = log π_trainer − log π_engine of a token and r = e^Δ,

    KL(engine ‖ trainer) ≈ mean of r − 1 − Δ        (Schulman's k3: never negative, 0 if both agree)

Rounding causes small |Δ|. Missing adapters, weights of a different step or a different prompt cause large |Δ|, mostly
in the first tokens of a response, before the text of the response determines its continuation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.response_routing import SequenceSplit
from nemo_popsd.observability.metrics import MismatchMetrics
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.config import GuardConfig
from nemo_popsd.training.objective import LossReport
from nemo_popsd.training.trajectory import Trajectory

logger = logging.getLogger(__name__)

START_TOKENS = 32
"""Number of tokens at the start of each response that are also compared separately."""

LARGEST_DIFFERENCE = 20.0
"""Differences are clamped to this value, so that a token with probability 0 does not make statistics infinite."""

_WARN = {True: 1e-7, False: 2e-2}
_STOP = {True: 1e-6, False: 1e-1}
"""Default bounds in nats per token. True: engine and trainer compute in fp32 with the same weights; they agree to 1e-12
(`megatron`) or 1e-9 (`vllm`), and weights that are one step old differ by 1e-5 (docs/guards.md has the measurements).
False: bf16 rounds to 1e-5 in the embedded model and to about 1e-3 in models of billions of parameters."""

CAUSES = (
    "template: the prompts of engine and trainer differ (different tokenizers or chat templates, an added or dropped "
    "token)",
    "weights version: the engine has the weights of another step, or none of the run (after it woke up or restarted)",
    "adapters: the engine generates without the adapters or with older ones (rollout.vllm.lora=merged sends merged "
    "weights instead)",
    "dtype: the engine computes in a different precision (rollout.vllm.dtype)",
    "temperature: the engine reports log-probabilities after temperature or filters, not those of the model",
)
"""Likely causes of a mismatch, the most frequent first."""


@dataclass(frozen=True)
class MismatchBounds:
    """KL per token above which a mismatch is reported, and above which it ends the run."""

    warn: float
    stop: float

    @classmethod
    def of(cls, guard: GuardConfig, *, exact: bool) -> MismatchBounds:
        """The bounds in `guard`, with defaults that depend on `exact`.

        Args:
            guard: the settings.
            exact: whether engine and trainer compute in fp32 with the same weights.
        """
        stop = _STOP[exact] if guard.mismatch_stop is None else guard.mismatch_stop
        warn = min(stop, _WARN[exact]) if guard.mismatch_warn is None else guard.mismatch_warn
        return cls(warn, stop)


class MismatchGuard:
    """Measures the mismatch of each step; warns or stops all ranks if it exceeds the bounds."""

    def __init__(self, settings: GuardConfig, bounds: MismatchBounds, split: SequenceSplit) -> None:
        """Stores references only.

        Args:
            settings: the actions.
            bounds: the bounds.
            split: split of the sequences over ranks, which determines the tokens that this rank reports.
        """
        self._settings = settings
        self._bounds = bounds
        self._split = split
        self._warned = False

    def __call__(
        self, step: int, reports: Sequence[LossReport], trajectories: Sequence[Trajectory]
    ) -> MismatchMetrics | None:
        """Measures the mismatch of one step. One all-gather of seven numbers over the world.

        Call it before the weights change. Of the ranks that share a token, exactly one must report it.

        Args:
            step: index of the step, counted from 1.
            reports: reports of this rank's micro-batches in the first update of the step.
            trajectories: this rank's trajectories of that update.

        Returns:
            The metrics, the same on every rank; None if no rank has a token.

        Raises:
            UserError: with `guard.mismatch=stop`, the KL exceeds the bound. Raised on every rank, before the update.
        """
        measured = _measure(_sums(reports, trajectories, self._split, self._settings.mismatch_token))
        if measured is None or self._settings.mismatch == "off":
            return measured
        worst = max(measured.kl, measured.start_kl)
        if worst > self._bounds.stop and self._settings.mismatch == "stop":
            raise UserError(
                f"rollouts of step {step}",
                got=f"tokens whose log-probability in the engine is not that of the trainer: {_words(measured)}",
                need=f"a KL of at most {self._bounds.stop:g} (guard.mismatch_stop); no weight was changed",
                fix="see the likely causes below; guard.mismatch=warn continues for an investigation",
                advice=[f"{number}. {cause}" for number, cause in enumerate(CAUSES, start=1)],
            )
        beyond = worst > self._bounds.warn
        if beyond and not self._warned:
            logger.warning(
                "step %d: the engine's log-probabilities of the sampled tokens differ from the trainer's: %s; the "
                "warning threshold is %g (guard.mismatch_warn). Likely causes: %s",
                step,
                _words(measured),
                self._bounds.warn,
                "; ".join(CAUSES),
            )
        self._warned = beyond
        return measured


def _words(measured: MismatchMetrics) -> str:
    return (
        f"KL {measured.kl:.3g} nats per token, {measured.start_kl:.3g} in the first {START_TOKENS} tokens of a "
        f"response, mean ratio {measured.mean_ratio:.3g}, largest difference {measured.max:.3g}, "
        f"{100 * measured.share:.3g} % of the tokens beyond guard.mismatch_token"
    )


def _sums(
    reports: Sequence[LossReport], trajectories: Sequence[Trajectory], split: SequenceSplit, bound: float
) -> Tensor:
    """Sums of this rank, float64 [7]: tokens, Σ k3, Σ r, tokens beyond the bound, tokens at the start, Σ k3 of these;
    last the largest |Δ|.
    """
    if not reports:
        return torch.zeros(7, dtype=torch.float64, device=device())
    engine: list[float] = []
    is_start: list[bool] = []
    for index in (index for report in reports for index in report.rows):
        rollout = trajectories[index].rollout
        owned = split.owned(rollout.response)
        engine += rollout.log_probs[owned]
        is_start += [position < START_TOKENS for position in range(len(rollout.response))[owned]]
    trainer_N = torch.cat([report.log_probs for report in reports]).double()
    difference_N = trainer_N - torch.tensor(engine, dtype=torch.float64).to(trainer_N.device)
    # NaN is replaced by the largest difference.
    difference_N = difference_N.nan_to_num(nan=math.inf).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    ratio_N, start_N = difference_N.exp(), torch.tensor(is_start, device=trainer_N.device)
    kl_N, size_N = ratio_N - 1 - difference_N, difference_N.abs()
    return torch.stack(
        [
            torch.full_like(kl_N.sum(), len(kl_N)),
            kl_N.sum(),
            ratio_N.sum(),
            (size_N > bound).sum().double(),
            start_N.sum().double(),
            torch.where(start_N, kl_N, 0.0).sum(),
            torch.cat([size_N, size_N.new_zeros(1)]).max(),
        ]
    )


def _measure(own: Tensor) -> MismatchMetrics | None:
    """The metrics over all ranks. One all-gather."""
    of_ranks = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather_into_tensor(of_ranks.flatten(), own)
    *_, largest = of_ranks.amax(0).tolist()
    tokens, kl, ratio, beyond, start_tokens, start_kl, _ = of_ranks.sum(0).tolist()
    if not tokens:
        return None
    return MismatchMetrics(
        kl=kl / tokens,
        start_kl=start_kl / max(start_tokens, 1.0),
        mean_ratio=ratio / tokens,
        max=largest,
        share=beyond / tokens,
    )
