"""The divergence of one chunk of tokens with its closed-form gradient, in place on the chunk's logits.

Let s, t be the logits of student and target, each less its row's maximum, Z_s and Z_t the sums of their exponentials,
and r = t − s − (log Z_t − log Z_s) = log q − log p. Then, with respect to the student's logits,

    forward KL(q‖p):  Σ e^t·(t−s)/Z_t − (log Z_t − log Z_s)       gradient  p − q
    reverse KL(p‖q):  Σ e^s·(s−t)/Z_s + (log Z_t − log Z_s)       gradient  p·(log p − log q − KL)
    JSD:              w·Σ q·(r − L) + (1−w)·Σ p·(−L)              gradient  (1−w)·p·(−L − KL(p‖m))

where L = log(m/p) = log1p(w·expm1(r)). Every form is exactly 0, with gradient exactly 0, where s and t are equal.
The arithmetic is in `rowwise.py`; here it is put in order, tile by tile, with what must cross the shards in between.

Legend: C tokens of the chunk, V true vocabulary entries of this rank, P ranks. Collectives: an all-gather of
[MEASURES, C]; the JSD, whose mixture needs both normalisers first, adds an all-reduce of [2, C]; a softly capped
model with a capped target, whose mean difference is no product, one of [C] before both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.fusion import Stages
from nemo_popsd.distillation.rowwise import MEASURES, Coefficients, Constants, capped_difference, total, watched
from nemo_popsd.distillation.target import Target
from nemo_popsd.parallel.collectives import gather_shards, group_size, reduce_sum_, sum_shards_


class ChunkLogits(NamedTuple):
    """What one chunk's divergence starts from; the [C, V] tensors are overwritten."""

    student: Tensor
    """W_s·h [C, V]."""
    frozen: dict[str, Tensor]
    """W·(state) [C, V]: `anchor` and `shift`, or of a softly capped model `base`, `privileged`, `reference`."""
    mean: Tensor | None
    """w̄·d [C], with `shift`."""
    bend: Tensor | None
    """[C, V] to be filled, of a softly capped model."""


class ChunkResult(NamedTuple):
    """Loss and statistics of one chunk, replicated over the group."""

    loss: Tensor
    """[C]."""
    statistics: Tensor
    """[4, C]: forward KL, reverse KL, student entropy, target entropy."""
    sample: Tensor | None
    """[P, ...] of what was given of the sample by each rank."""


@dataclass(frozen=True)
class Overlap:
    """Work of the chunk before, put in while this chunk's collectives are under way."""

    first: Callable[[], None]
    """During the first collective where another one follows."""
    rest: Callable[[], None]
    """During the last collective; afterwards nothing may be left."""


class ChunkDivergence:
    """Divergence between softmax(s) and softmax(t) over the sharded vocabulary, chunk after chunk."""

    def __init__(
        self,
        target: Target,
        divergence: Divergence,
        stages: Stages,
        tp_group: dist.ProcessGroup | None,
        *,
        vocab_size: int,
        soft_cap: float | None,
        like: Tensor,
    ) -> None:
        """Keeps the settings.

        Args:
            target: the family member.
            divergence: which divergence.
            stages: the arithmetic.
            tp_group: the group over which the vocabulary is sharded; None for one shard.
            vocab_size: true vocabulary of all shards.
            soft_cap: κ of a model that caps its logits softly, else None.
            like: dtype of the statistics, and device.
        """

        def scalar(value: float) -> Tensor:
            return torch.full((), value, dtype=like.dtype, device=like.device)

        tau, cap = target.temperature, target.cap
        inside = 0.0 if cap is None else 1 / (cap * (tau if soft_cap is None else 1))
        self._constants = Constants(
            inverse_temperature=scalar(1 / tau),
            inside=scalar(inside),
            outside=scalar(0.0 if cap is None else target.privileged * cap),
            student=scalar(target.student),
            weight=scalar(divergence.weight),
        )
        self._coefficients: Coefficients | None = None
        if soft_cap is not None:
            self._coefficients = Coefficients(
                inverse_soft_cap=scalar(1 / soft_cap),
                soft_cap_over_temperature=scalar(soft_cap / tau),
                base=scalar(target.base),
                privileged=scalar(target.privileged),
                reference=scalar(target.reference),
            )
        self._divergence, self._stages = divergence, stages
        self._group, self._vocab_size = tp_group, vocab_size

    def __call__(
        self,
        logits: ChunkLogits,
        weights_C: Tensor,
        out_CV: Tensor | None,
        *,
        gradient: bool,
        sample: Tensor | None,
        overlap: Overlap,
    ) -> ChunkResult:
        """Loss of one chunk, and its gradient.

        With one shard each tile of rows goes through all steps while it is in the cache; with more, all tiles go
        through a step before the next.

        Args:
            logits: raw products.
            weights_C: what the gradient of each token is multiplied with.
            out_CV: where weights · dD/dz goes, z being `logits.student` before the temperature; None: in its place.
            gradient: whether it is wanted at all.
            sample: this shard's measures of sampled tokens, which go along with the first collective.
            overlap: work to put in between.
        """
        tokens, width = logits.student.shape
        step = self._stages.tile_rows(width, logits.student.dtype, logits.student.device)
        tiles = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        loss_C = logits.student.new_empty(tokens)
        statistics_4C = logits.student.new_empty(4, tokens)
        gathered: Tensor | None = None
        for together in [[tile] for tile in tiles] if group_size(self._group) == 1 else [tiles]:
            start, stop = together[0].start, together[-1].stop
            measures_8n = _joined([self._measure(logits, tile) for tile in together])
            sent = [measures_8n] if sample is None or start > 0 else [measures_8n, sample]
            last = self._divergence.kind != "jsd"
            measures_P8n, *others = gather_shards(sent, self._group, overlap.rest if last else overlap.first)
            if others:
                gathered = others[0]
            measured = [(tile, measures_P8n[:, :, tile.start - start : tile.stop - start]) for tile in together]
            steps = self._finish_jsd if not last else self._finish_kl
            loss_C[start:stop] = steps(logits, measured, weights_C, out_CV, statistics_4C, gradient, overlap)
        return ChunkResult(loss_C, statistics_4C, gathered)

    def _measure(self, logits: ChunkLogits, tile: slice) -> Tensor:
        """[MEASURES, R] of one tile on this shard."""
        s_RV = logits.student[tile]
        if s_RV.shape[1] == 0:  # nothing but padding on this shard
            nothing = s_RV.new_zeros(MEASURES, s_RV.shape[0])
            nothing[:2] = -torch.inf
            return nothing
        frozen = {name: product[tile] for name, product in logits.frozen.items()}
        mean_R = None if logits.mean is None else logits.mean[tile]
        if self._coefficients is None:
            return self._stages.measure(s_RV, frozen.get("anchor"), frozen.get("shift"), mean_R, self._constants)
        assert logits.bend is not None
        branches = (frozen.get("base"), frozen.get("privileged"), frozen.get("reference"))
        return self._stages.measure_capped(
            s_RV, logits.bend[tile], *branches, mean_R, self._coefficients, self._constants
        )

    def scaled(self, product: Tensor) -> Tensor:
        """Logits at the loss's temperature from a raw product."""
        if self._coefficients is None:
            return product * self._constants.inverse_temperature
        capped = torch.tanh(product * self._coefficients.inverse_soft_cap)
        return capped * self._coefficients.soft_cap_over_temperature

    def capped_mean(self, privileged_CV: Tensor, reference_CV: Tensor) -> Tensor:
        """Vocabulary mean of the difference of T and ref of a softly capped model: [C]; one all-reduce."""
        assert self._coefficients is not None
        step = self._stages.tile_rows(privileged_CV.shape[1], privileged_CV.dtype, privileged_CV.device)
        parts = [
            capped_difference(privileged_RV, reference_RV, self._coefficients)
            for privileged_RV, reference_RV in zip(privileged_CV.split(step), reference_CV.split(step), strict=True)
        ]
        return reduce_sum_(_joined(parts), self._group).div_(self._vocab_size)

    def _finish_kl(
        self,
        logits: ChunkLogits,
        measured: list[tuple[slice, Tensor]],
        weights_C: Tensor,
        out_CV: Tensor | None,
        statistics_4C: Tensor,
        gradient: bool,
        overlap: Overlap,
    ) -> Tensor:
        forward = self._divergence.kind == "forward_kl"
        slope = self._stages.slope_forward if forward else self._stages.slope_reverse
        t_CV = _target(logits)
        losses = []
        for tile, measures_P8R in measured:
            if gradient and t_CV.shape[1]:
                out_RV = None if out_CV is None else out_CV[tile]
                statistics_4R = slope(logits.student[tile], t_CV[tile], measures_P8R, weights_C[tile], out_RV)
                _bend_(logits, tile, out_RV)
            else:
                statistics_4R = watched(total(measures_P8R))
            statistics_4C[:, tile] = statistics_4R
            losses.append(statistics_4R[0 if forward else 1])
        return _joined(losses)

    def _finish_jsd(
        self,
        logits: ChunkLogits,
        measured: list[tuple[slice, Tensor]],
        weights_C: Tensor,
        out_CV: Tensor | None,
        statistics_4C: Tensor,
        gradient: bool,
        overlap: Overlap,
    ) -> Tensor:
        t_CV = _target(logits)
        parts = []
        for tile, measures_P8R in measured:
            statistics_4C[:, tile], part_2R = self._stages.mix(
                logits.student[tile], t_CV[tile], measures_P8R, self._constants
            )
            parts.append(part_2R)
        kl_qm_C, kl_pm_C = sum_shards_(_joined(parts), self._group, overlap.rest)
        if gradient and t_CV.shape[1]:
            start = measured[0][0].start
            for tile, _ in measured:
                out_RV = None if out_CV is None else out_CV[tile]
                kl_pm_R = kl_pm_C[tile.start - start : tile.stop - start]
                self._stages.jsd_grad(
                    logits.student[tile], t_CV[tile], kl_pm_R, weights_C[tile], out_RV, self._constants
                )
                _bend_(logits, tile, out_RV)
        w = self._divergence.weight
        return w * kl_qm_C + (1 - w) * kl_pm_C


def _target(logits: ChunkLogits) -> Tensor:
    """Where `measure` and `measure_capped` leave the target's logits: the first product there is, in their order."""
    order = ("anchor", "base", "privileged", "reference", "shift")
    return next(logits.frozen[name] for name in order if name in logits.frozen)


def _bend_(logits: ChunkLogits, tile: slice, out_RV: Tensor | None) -> None:
    """The chain rule through the student's soft cap, where it has one."""
    if logits.bend is not None:
        (logits.student[tile] if out_RV is None else out_RV).mul_(logits.bend[tile])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
