"""The loss of one chunk of tokens: equations, order of evaluation, and collectives over the shards of the vocabulary.

Let s and t be the logits of student and target, each minus its maximum over the vocabulary, Z_s and Z_t the sums of
their exponentials, and r = t − s − (log Z_t − log Z_s) = log q − log p. Then, with respect to the student's logits,

    forward KL(q‖p):  Σ e^t·(t−s)/Z_t − (log Z_t − log Z_s)       gradient  p − q
    reverse KL(p‖q):  Σ e^s·(s−t)/Z_s + (log Z_t − log Z_s)       gradient  p·(log p − log q − KL)
    JSD:              w·Σ q·(r − L) + (1−w)·Σ p·(−L)              gradient  (1−w)·p·(−L − KL(p‖m))

where L = log(m/p) = log1p(w·expm1(r)). Every form and its gradient are exactly 0 if s and t are equal.

Each kernel is a function of one tile of tokens on one shard. It uses no process group and writes logit-sized results in
place. `fusion.py` compiles the kernels; the uncompiled kernels are the reference. `ChunkDivergence` calls them in this
order, each followed by the collective on the right:

    shard_stats      s and t from raw products, and their statistics on this shard    all-gather of [SHARD_STATS, C]
    jsd_mixture      (JSD) the statistics of the mixture on this shard                all-reduce of [2, C]
    *_grad           the gradient, from all shards' statistics

Legend: C tokens of the chunk, R tokens of a tile, V true vocabulary entries of this rank, P ranks, S token statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_popsd.distillation.chunks import Chunk, ChunkResult
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.gates import Gates
from nemo_popsd.distillation.statistics import TOKEN_STATISTICS, VocabStats
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.distillation.token_log_probs import log_normaliser, merge_token_stats
from nemo_popsd.parallel.collectives import gather_shards, sum_shards_
from nemo_popsd.parallel.vocabulary import VocabShard

LARGEST_LOG_RATIO = 80.0
"""Above this ratio the student's share of the mixture is below the resolution of every float dtype, and exp would
overflow.
"""

SHARD_STATS = 8
"""Entries of `shard_stats`: max s, max t, Σe^S, Σe^T, Σe^S·S, Σe^T·T, Σe^S·D, Σe^T·D; S and T are s and t minus their
maximum over this shard, D is T - S."""


class Constants(NamedTuple):
    """Scalars of target and divergence as tensors, so that one compilation serves all values."""

    inverse_temperature: Tensor
    """1/τ."""
    inside: Tensor
    """1/(τ·c) with the cap c of the target."""
    outside: Tensor
    """a_T·c."""
    student: Tensor
    """a_S."""
    weight: Tensor
    """w of the JSD."""
    clip: Tensor
    """Largest entry of the divergence; ∞ without a clip."""


# --- Kernels ----------------------------------------------------------------------------------------------------------


def shard_stats(
    s_RV: Tensor, anchor_RV: Tensor | None, shift_RV: Tensor | None, mean_R: Tensor | None, constants: Constants
) -> Tensor:
    """Computes s and t from raw products, in place, and returns their statistics on this shard.

    s replaces `s_RV`; t replaces `anchor_RV`, or `shift_RV` if there is no anchor.

    Args:
        s_RV: W_s·h.
        anchor_RV: W·anchor, or None.
        shift_RV: W·d, or None.
        mean_R: w̄·d, the mean of W·d over the true vocabulary; None if `shift_RV` is None.
        constants: scalars of target and divergence.

    Returns:
        [SHARD_STATS, R].
    """
    s = s_RV * constants.inverse_temperature
    t = s * constants.student
    if shift_RV is not None:
        assert mean_R is not None
        t = t + torch.tanh((shift_RV - mean_R[:, None]) * constants.inside) * constants.outside
    if anchor_RV is not None:
        t = t + anchor_RV * constants.inverse_temperature
    s_RV.copy_(s)
    t_RV = shift_RV if anchor_RV is None else anchor_RV
    assert t_RV is not None
    t_RV.copy_(t)
    max_s, max_t = s.amax(-1), t.amax(-1)
    s, t = s - max_s[:, None], t - max_t[:, None]
    exp_s, exp_t = s.exp(), t.exp()
    difference = t - s
    return torch.stack(
        (
            max_s,
            max_t,
            exp_s.sum(-1),
            exp_t.sum(-1),
            (exp_s * s).sum(-1),
            (exp_t * t).sum(-1),
            (exp_s * difference).sum(-1),
            (exp_t * difference).sum(-1),
        )
    )


def merge_shards(stats_PKR: Tensor) -> VocabStats:
    """Statistics over the full vocabulary from `shard_stats` of all shards [P, SHARD_STATS, R].

    The sums of a shard are relative to its own maxima. With gap = maximum of the shard − global maximum, e^gap·Σ makes
    them relative to the global maximum. If s = t on every shard, both KLs are exactly 0.
    """
    max_s, max_t, z_s, z_t, s_s, t_t, s_difference, t_difference = stats_PKR.unbind(1)
    largest_s, largest_t = max_s.amax(0), max_t.amax(0)
    # A shard with only padding has maximum −∞. It is excluded, since 0·∞ would be NaN.
    gap_s = torch.where(max_s == -torch.inf, 0.0, max_s - largest_s)
    gap_t = torch.where(max_t == -torch.inf, 0.0, max_t - largest_t)
    share_s, share_t = gap_s.exp(), gap_t.exp()
    gap_difference = gap_t - gap_s
    total_z_s, total_z_t = (share_s * z_s).sum(0), (share_t * z_t).sum(0)
    log_z_s, log_z_t = total_z_s.log(), total_z_t.log()
    offset = log_z_t - log_z_s
    mean_difference = (share_s * (s_difference + gap_difference * z_s)).sum(0) / total_z_s
    return VocabStats(
        max_s=largest_s,
        max_t=largest_t,
        z_s=total_z_s,
        z_t=total_z_t,
        mean_difference=mean_difference,
        forward_kl=(share_t * (t_difference + gap_difference * z_t)).sum(0) / total_z_t - offset,
        reverse_kl=offset - mean_difference,
        student_entropy=log_z_s - (share_s * (s_s + gap_s * z_s)).sum(0) / total_z_s,
        target_entropy=log_z_t - (share_t * (t_t + gap_t * z_t)).sum(0) / total_z_t,
    )


def kl_and_entropy(stats: VocabStats) -> Tensor:
    """Token statistics [S, R] in the order of `TOKEN_STATISTICS`."""
    return torch.stack([statistic.closed_form(stats) for statistic in TOKEN_STATISTICS])


def forward_kl_grad(
    s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, weights_R: Tensor, out_RV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of weights·KL(q‖p), weights·(p − q), to `out_RV`, or to `s_RV` if that is None.

    Returns:
        KL(q‖p) [R], and `kl_and_entropy`.
    """
    stats = merge_shards(stats_PKR)
    p = (s_RV - stats.max_s[:, None]).exp() / stats.z_s[:, None]
    q = (t_RV - stats.max_t[:, None]).exp() / stats.z_t[:, None]
    (s_RV if out_RV is None else out_RV).copy_((p - q) * weights_R[:, None])
    return stats.forward_kl, kl_and_entropy(stats)


def reverse_kl_grad(
    s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, weights_R: Tensor, out_RV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of weights·KL(p‖q) to `out_RV`, or to `s_RV` if that is None.

    The gradient is weights·p·(log p − log q − KL); the normalisers cancel in the bracket.

    Returns:
        KL(p‖q) [R], and `kl_and_entropy`.
    """
    stats = merge_shards(stats_PKR)
    s, t = s_RV - stats.max_s[:, None], t_RV - stats.max_t[:, None]
    p = s.exp() / stats.z_s[:, None]
    (s_RV if out_RV is None else out_RV).copy_(p * (stats.mean_difference[:, None] - (t - s)) * weights_R[:, None])
    return stats.reverse_kl, kl_and_entropy(stats)


def jsd_mixture(s_RV: Tensor, t_RV: Tensor, stats_PKR: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """Computes the mixture m = w·q + (1−w)·p of the JSD. p replaces `s_RV`, and log(m/p) replaces `t_RV`.

    log(m/p) = log1p(w·expm1(r)) with r = log q − log p; it is exactly 0 if q = p.

    Returns:
        KL(q‖m) and KL(p‖m) on this shard [2, R], and `kl_and_entropy`.
    """
    stats = merge_shards(stats_PKR)
    s, t = s_RV - stats.max_s[:, None], t_RV - stats.max_t[:, None]
    offset = stats.z_t.log() - stats.z_s.log()
    ratio = (t - s - offset[:, None]).clamp(max=LARGEST_LOG_RATIO)
    log_m_over_p = torch.log1p(torch.expm1(ratio) * constants.weight)
    p = s.exp() / stats.z_s[:, None]
    q = t.exp() / stats.z_t[:, None]
    s_RV.copy_(p)
    t_RV.copy_(log_m_over_p)
    parts = torch.stack(((q * (ratio - log_m_over_p)).sum(-1), -(p * log_m_over_p).sum(-1)))
    return parts, kl_and_entropy(stats)


def jsd_grad(
    p_RV: Tensor,
    log_m_over_p_RV: Tensor,
    kl_pm_R: Tensor,
    weights_R: Tensor,
    out_RV: Tensor | None,
    constants: Constants,
) -> None:
    """Writes the gradient of weights·JSD to `out_RV`, or to `p_RV` if that is None.

    The gradient is weights·(1−w)·p·(−log(m/p) − KL(p‖m)). No two arguments may share memory: compiled code
    does not detect that they overlap.
    """
    factor = weights_R * (constants.weight - 1)
    (p_RV if out_RV is None else out_RV).copy_(p_RV * factor[:, None] * (log_m_over_p_RV + kl_pm_R[:, None]))


class Kernels(NamedTuple):
    """The kernels that the loss calls, compiled or uncompiled, and their tile size."""

    shard_stats: Callable[..., Tensor]
    jsd_mixture: Callable[..., tuple[Tensor, Tensor]]
    jsd_grad: Callable[..., None]
    forward_kl_grad: Callable[..., tuple[Tensor, Tensor]]
    reverse_kl_grad: Callable[..., tuple[Tensor, Tensor]]
    clipped_entries: Mapping[str, Callable[..., tuple[Tensor, Tensor]]]
    """Kernels by kind of divergence; see `clipped`."""
    clipped_grad: Callable[..., None]
    fused: bool
    tile_tokens: Callable[[int, torch.dtype, torch.device], int]
    """Number of tokens of a tile, given the number of true entries, dtype and device."""


# --- One chunk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Work of the previous chunk that overlaps this chunk's collectives."""

    first: Callable[[], None]
    """Runs during the first collective if a second one follows."""
    rest: Callable[[], None]
    """Runs during the last collective and completes the work."""


class ChunkDivergence:
    """Divergence between softmax(s) and softmax(t) over the sharded vocabulary, for one chunk at a time."""

    def __init__(
        self, target: Target, divergence: Divergence, gates: Gates, kernels: Kernels, shard: VocabShard, *, like: Tensor
    ) -> None:
        """Stores the settings; `like` determines the dtype of the statistics and the device."""

        def scalar(value: float) -> Tensor:
            return torch.full((), value, dtype=like.dtype, device=like.device)

        tau, cap = target.temperature, target.cap
        self._constants = Constants(
            inverse_temperature=scalar(1 / tau),
            inside=scalar(0.0 if cap is None else 1 / (cap * tau)),
            outside=scalar(0.0 if cap is None else target.privileged * cap),
            student=scalar(target.student),
            weight=scalar(divergence.weight),
            clip=scalar(math.inf if divergence.clip is None else divergence.clip),
        )
        self._divergence, self._gates, self._kernels, self._shard = divergence, gates, kernels, shard

    def __call__(self, chunk: Chunk, overlap: Overlap) -> ChunkResult:
        """Computes the loss of one chunk and its gradient.

        With one shard, all kernels process a tile while it is in the cache. With several shards, each kernel processes
        all tiles before the next kernel starts, so that a collective runs once per chunk instead of once per tile.
        """
        tokens, width = chunk.student.shape
        step = self._kernels.tile_tokens(width, chunk.student.dtype, chunk.student.device)
        tiles = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        during_gather = overlap.first if self._divergence.sums_entries else overlap.rest
        losses, statistics, opened, normalisers = [], [], [], []
        carried = [x for x in (chunk.signal_stats, chunk.token_stats) if x is not None]
        gathered_once: list[Tensor] = []
        for tile_group in [[tile] for tile in tiles] if self._shard.ranks == 1 else [tiles]:
            start = tile_group[0].start
            sent = [_joined([self._shard_stats(chunk, tile) for tile in tile_group])]
            stats_PKn, *others = gather_shards(sent + (carried if start == 0 else []), self._shard.group, during_gather)
            gathered_once += others
            if chunk.token_stats is not None:
                normalisers.append(log_normaliser(stats_PKn))
            gathered = [(tile, stats_PKn[:, :, tile.start - start : tile.stop - start]) for tile in tile_group]
            weights_n = _joined([chunk.weights[tile] for tile, _ in gathered])
            if self._gates:
                opened.append(self._gates.open(merge_shards(stats_PKn)).to(weights_n.dtype))
                weights_n = weights_n * opened[-1]
            weights = weights_n.split([tile.stop - tile.start for tile, _ in gathered])
            loss_n, statistics_Sn = self._finish(chunk, gathered, weights, overlap)
            losses.append(loss_n)
            statistics.append(statistics_Sn)
        signal = None if chunk.signal_stats is None else gathered_once[0]
        log_probs = None if chunk.token_stats is None else merge_token_stats(gathered_once[-1], _joined(normalisers))
        is_open = _joined(opened) if opened else None
        return ChunkResult(_joined(losses), _joined(statistics), signal, log_probs, is_open)

    def _shard_stats(self, chunk: Chunk, tile: slice) -> Tensor:
        """[SHARD_STATS, R] of one tile on this shard."""
        s_RV = chunk.student[tile]
        if s_RV.shape[1] == 0:  # a shard that holds only padding
            empty_stats = s_RV.new_zeros(SHARD_STATS, s_RV.shape[0])
            empty_stats[:2] = -torch.inf
            return empty_stats
        anchor, shift, mean = (x if x is None else x[tile] for x in (chunk.anchor, chunk.shift, chunk.shift_mean))
        return self._kernels.shard_stats(s_RV, anchor, shift, mean, self._constants)

    def _finish(
        self, chunk: Chunk, gathered: list[tuple[slice, Tensor]], weights: Sequence[Tensor], overlap: Overlap
    ) -> tuple[Tensor, Tensor]:
        """Loss and statistics of tiles, from `shard_stats` of all shards; writes their weighted gradient."""
        kernels, kind, clipped = self._kernels, self._divergence.kind, self._divergence.clip is not None
        backward = chunk.needs_gradient and chunk.student.shape[1] > 0
        values, statistics = [], []
        for (tile, stats_PKR), weights_R in zip(gathered, weights, strict=True):
            logits = chunk.student[tile], chunk.target[tile], stats_PKR
            if clipped:
                value, statistics_SR = kernels.clipped_entries[kind](*logits, self._constants)
            elif kind == "jsd":
                value, statistics_SR = kernels.jsd_mixture(*logits, self._constants)
            elif backward:
                kl_grad = kernels.forward_kl_grad if kind == "forward_kl" else kernels.reverse_kl_grad
                value, statistics_SR = kl_grad(*logits, weights_R, chunk.gradient_of(tile))
            else:
                stats = merge_shards(stats_PKR)
                value = stats.forward_kl if kind == "forward_kl" else stats.reverse_kl
                statistics_SR = kl_and_entropy(stats)
            values.append(value)
            statistics.append(statistics_SR)
        if not self._divergence.sums_entries:
            return _joined(values), _joined(statistics)
        # The clipped sum and G of `clipped`, or KL(q‖m) and KL(p‖m).
        first_C, second_C = sum_shards_(_joined(values), self._shard.group, overlap.rest)
        if backward:
            sums = second_C.split([len(value[0]) for value in values])
            for (tile, _), weights_R, sum_R in zip(gathered, weights, sums, strict=True):
                parts = chunk.student[tile], chunk.target[tile], sum_R, weights_R, chunk.gradient_of(tile)
                if clipped:
                    kernels.clipped_grad(*parts)
                else:
                    kernels.jsd_grad(*parts, self._constants)
        if clipped:
            return first_C, _joined(statistics)
        w = self._divergence.weight
        return w * first_C + (1 - w) * second_C, _joined(statistics)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
