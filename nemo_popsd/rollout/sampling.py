"""Samples tokens from vocabulary-sharded logits: temperature, top-k, top-p, one uniform number per token.

The sampled token is defined on the full vocabulary and does not depend on the sharding, up to the rounding of sums: one
shard runs the same steps as several, without the collectives. Logits are never gathered.

Shapes: B sequences, V entries of this shard's vocabulary, R shards, K candidates.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.parallel.vocabulary import VocabShard
from nemo_popsd.rollout.engine import SamplingParams

_LOW = 0xFFFFFFFF
_DIGITS = (24, 16, 8, 0)


def uniforms(seeds: list[int], tokens: int) -> Tensor:
    """Random numbers in [0, 1) for `tokens` tokens of each sequence: [B, tokens] float64 on the CPU.

    Each sequence has its own generator, so its numbers depend only on its seed.
    """
    numbers = [torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(numbers)


def sample_tokens(
    logits_BV: Tensor, sampling: SamplingParams, uniform_B: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Samples one token per sequence by inverting the distribution function of the filtered, tempered softmax.

    Filters are applied in the usual order: temperature, top-k, top-p. Top-p keeps tokens by descending logit (ties by
    id) until their mass reaches top_p; the most likely token always remains. The mass of each token is computed in
    fp32, and masses are summed in float64. The distribution function orders tokens by descending probability with
    top-k, and by id without.

    Collectives over the shards, for one token of all sequences; none with one shard:

    - greedy or top-k: one all-gather of [B, k + 1] int64 (the best k of each shard, and its log-sum-exp)
    - no filter: one all-gather of [B, 3] float64 and one all-reduce of [B, 2] float64
    - top-p alone: six all-gathers, four of them of [B, 256] float64, and one all-reduce of [B, 2] float64

    Every rank computes the result from the same numbers, so the ranks agree bit for bit.

    Args:
        logits_BV: logits of this shard, any float dtype.
        sampling: temperature 0 selects the most likely token.
        uniform_B: random numbers in [0, 1), float64, the same on all shards.
        shard: the vocabulary entries of the columns of `logits_BV`; padding is never sampled.

    Returns:
        Token ids [B] int64, and their log-probabilities [B] fp32 under the softmax of all logits at temperature 1,
        unfiltered.
    """
    logits_BV = _true_columns(logits_BV, shard)
    if sampling.temperature == 0:
        return _sample_from_top(logits_BV, 1, 1.0, 1.0, uniform_B, shard)
    if 0 < sampling.top_k < shard.vocab_size:
        return _sample_from_top(logits_BV, sampling.top_k, sampling.temperature, sampling.top_p, uniform_B, shard)
    if sampling.top_p < 1:
        return _sample_from_nucleus(logits_BV, sampling.temperature, sampling.top_p, uniform_B, shard)
    return _sample_from_all(logits_BV, sampling.temperature, uniform_B, shard)


def _sample_from_top(
    logits_BV: Tensor, count: int, temperature: float, top_p: float, uniform_B: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Merges the top candidates of each shard, which include the global top candidates."""
    ids_V = torch.arange(shard.offset, shard.offset + logits_BV.shape[1], device=logits_BV.device)
    keys_BV = (_sortable(logits_BV).long() << 32) | (_LOW - ids_V)
    keys_BK = keys_BV.topk(min(count, keys_BV.shape[1]), dim=-1).values
    if keys_BK.shape[1] < count:
        keys_BK = torch.nn.functional.pad(keys_BK, (0, count - keys_BK.shape[1]), value=torch.iinfo(torch.int64).min)
    normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True).double()
    both_RBK = _gather(torch.cat([keys_BK, normaliser_B1.view(torch.int64)], dim=1), shard)
    normaliser_B = both_RBK[..., -1].contiguous().view(torch.float64).logsumexp(0)
    keys_BK = both_RBK[..., :-1].transpose(0, 1).flatten(1).topk(count, dim=-1).values
    values_BK = _from_sortable((keys_BK >> 32).int())
    mass_BK = (values_BK.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # A candidate remains if the mass before it has not reached top_p; so the first always remains.
    last_B1 = (mass_BK < top_p).sum(-1, keepdim=True) if top_p < 1 else torch.full_like(keys_BK[:, :1], count)
    threshold_B1 = uniform_B[:, None] * mass_BK.gather(-1, last_B1.clamp_(max=count - 1))
    chosen_B1 = (mass_BK <= threshold_B1).sum(-1, keepdim=True).clamp_(max=count - 1)
    tokens_B = _LOW - (keys_BK.gather(-1, chosen_B1).squeeze(-1) & _LOW)
    return tokens_B, (values_BK.gather(-1, chosen_B1).squeeze(-1).double() - normaliser_B).float()


def _sample_from_all(
    logits_BV: Tensor, temperature: float, uniform_B: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Finds the shard by the masses of the shards, then the token by the masses in it."""
    scaled_BV = logits_BV if temperature == 1 else logits_BV / temperature
    greatest_B = scaled_BV.amax(-1)
    weights_BV = (scaled_BV - _finite(greatest_B)[:, None]).exp()
    sums_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    normaliser_B = logits_BV.logsumexp(-1)
    gathered_RB3 = _gather(torch.stack([greatest_B.double(), sums_BV[:, -1], normaliser_B.double()], dim=-1), shard)
    greatest_RB, mass_RB, normaliser_RB = gathered_RB3.unbind(-1)
    scale_RB = (greatest_RB - greatest_RB.amax(0)).exp()
    return _invert(logits_BV, sums_BV, scale_RB * mass_RB, scale_RB, normaliser_RB.logsumexp(0), uniform_B, shard)


def _sample_from_nucleus(
    logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Finds the smallest remaining logit, eight bits at a time, from the masses of logits with equal leading bits."""
    scaled_BV = logits_BV / temperature
    stacked_RB2 = _gather(torch.stack([scaled_BV.amax(-1), logits_BV.logsumexp(-1)], dim=-1).double(), shard)
    greatest_B, normaliser_B = stacked_RB2[..., 0].amax(0), stacked_RB2[..., 1].logsumexp(0)
    weights_BV = (scaled_BV - greatest_B.float()[:, None]).exp().double()
    keys_BV = _sortable(logits_BV).long() + 2**31
    prefix_B1 = torch.zeros_like(keys_BV[:, :1])
    before_B1 = torch.zeros_like(weights_BV[:, :1])
    goal_B1 = before_B1
    for shift in _DIGITS:
        share_BV = torch.where(keys_BV >> (shift + 8) == prefix_B1, weights_BV, 0.0)
        local_B256 = weights_BV.new_zeros(len(keys_BV), 256).scatter_add_(1, 255 - (keys_BV >> shift & 255), share_BV)
        mass_B256 = _gather(local_B256, shard).sum(0)  # by falling digit
        sums_B256 = mass_B256.cumsum(-1)
        if shift == _DIGITS[0]:
            goal_B1 = top_p * sums_B256[:, -1:]
        # If rounding leaves the goal unreached, the last digit with a mass is taken.
        last_B1 = (sums_B256 < sums_B256[:, -1:]).sum(-1, keepdim=True)
        digit_B1 = torch.minimum((before_B1 + sums_B256 < goal_B1).sum(-1, keepdim=True), last_B1)
        before_B1 = before_B1 + sums_B256.gather(1, digit_B1) - mass_B256.gather(1, digit_B1)
        prefix_B1 = (prefix_B1 << 8) + 255 - digit_B1
    above_BV, equal_BV = keys_BV > prefix_B1, keys_BV == prefix_B1
    mass_B = torch.where(above_BV, weights_BV, 0.0).sum(-1)
    gathered_RB2 = _gather(torch.stack([mass_B, equal_BV.sum(-1).double()], dim=-1), shard)
    mass_RB, equal_RB = gathered_RB2.unbind(-1)
    border_B = (_from_sortable((prefix_B1 - 2**31).int()).squeeze(1) / temperature - greatest_B.float()).exp().double()
    wanted_B = ((goal_B1.squeeze(1) - mass_RB.sum(0)) / border_B).ceil().clamp(min=1)
    kept_RB = torch.minimum((wanted_B - (equal_RB.cumsum(0) - equal_RB)).clamp(min=0), equal_RB)
    stays_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= kept_RB[shard.rank][:, None]))
    sums_BV = torch.where(stays_BV, weights_BV, 0.0).cumsum(-1)
    mass_RB = mass_RB + kept_RB * border_B
    return _invert(logits_BV, sums_BV, mass_RB, torch.ones_like(mass_RB), normaliser_B, uniform_B, shard)


def _invert(
    logits_BV: Tensor,
    sums_BV: Tensor,
    mass_RB: Tensor,
    scale_RB: Tensor,
    normaliser_B: Tensor,
    uniform_B: Tensor,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Inverts the distribution function in the order of the ids.

    Args:
        logits_BV: logits of this shard.
        sums_BV: running sums of the masses of this shard in the unit of the shard, float64.
        mass_RB: mass of each shard, in a common unit.
        scale_RB: unit of each shard in the common unit.
        normaliser_B: log-sum-exp of all logits.
        uniform_B: the random numbers.
        shard: the shard of this rank.
    """
    until_RB = mass_RB.cumsum(0)
    threshold_B = uniform_B * until_RB[-1]
    # The threshold is smaller than the total, so it lies in one shard, whose mass is positive.
    owner_B = (until_RB <= threshold_B).sum(0)
    owned_B = owner_B == shard.rank
    beyond_B = threshold_B - (until_RB[shard.rank] - mass_RB[shard.rank])
    local_B1 = (beyond_B / scale_RB[shard.rank])[:, None]
    last_B1 = (sums_BV < sums_BV[:, -1:]).sum(-1, keepdim=True)
    index_B1 = torch.minimum((sums_BV <= local_B1).sum(-1, keepdim=True), last_B1)
    chosen_B2 = torch.cat([(index_B1 + shard.offset).double(), logits_BV.gather(1, index_B1).double()], dim=1)
    chosen_B2 = _select_owner(chosen_B2, owned_B, shard)
    return chosen_B2[:, 0].long(), (chosen_B2[:, 1] - normaliser_B).float()


def _true_columns(logits_BV: Tensor, shard: VocabShard) -> Tensor:
    """The columns that are not padding, in fp32; one column of -inf if there are none."""
    if shard.true_width == 0:
        return torch.full_like(logits_BV[:, :1], -torch.inf, dtype=torch.float32)
    return logits_BV[:, : shard.true_width].float()


def _gather(x: Tensor, shard: VocabShard) -> Tensor:
    """`x` of all shards, [R, ...]. One all-gather, none with one shard."""
    if shard.ranks == 1:
        return x[None]
    gathered = x.new_empty(shard.ranks, *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=shard.group)
    return gathered


def _select_owner(x: Tensor, owned_B: Tensor, shard: VocabShard) -> Tensor:
    """`x` [B, ...] of the one shard for which `owned_B` is true. One all-reduce, none with one shard."""
    if shard.ranks == 1:
        return x
    chosen = torch.where(owned_B.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))
    dist.all_reduce(chosen, group=shard.group)
    return chosen


def _finite(x: Tensor) -> Tensor:
    """`x` with 0 in place of -inf."""
    return torch.where(x == -torch.inf, torch.zeros_like(x), x)


def _sortable(x: Tensor) -> Tensor:
    """Int32 keys in the order of the fp32 numbers `x`; both zeros have the same key."""
    return _flip((x + 0.0).view(torch.int32))


def _from_sortable(keys: Tensor) -> Tensor:
    """The inverse of `_sortable`."""
    return _flip(keys).view(torch.float32)


def _flip(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
