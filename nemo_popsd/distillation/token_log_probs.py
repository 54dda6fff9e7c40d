"""The student's log-probability of each response token at temperature 1, from the logits of the loss.

The trainer compares it with the rollout engine's log-probability of the same token. The loss divides logits by the
temperature of the target. If that is 1, the loss's normaliser is reused, and the logits are not read a second time.

Legend: C tokens of the chunk, V true vocabulary entries of this rank, P ranks, K 1 or 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_popsd.parallel.vocabulary import VocabShard


def token_stats(s_CV: Tensor, ids_C: Tensor, shard: VocabShard, *, own_normaliser: bool, tile_tokens: int) -> Tensor:
    """The logit of each token (−∞ if another shard holds it), and optionally log Σ exp of this shard's logits: [K, C].

    No collective; the result joins the first all-gather of the chunk.

    Args:
        s_CV: W_s·h, before the division by the temperature and before the loss overwrites it.
        ids_C: vocabulary ids of the tokens.
        shard: vocabulary entries of the columns.
        own_normaliser: whether to compute log Σ exp, because the normaliser of the loss has a different temperature.
        tile_tokens: number of tokens whose exponentials exist at the same time for it.
    """
    local_C = ids_C - shard.offset
    is_here_C = (local_C >= 0) & (local_C < shard.true_width)
    nowhere_C = s_CV.new_full((len(ids_C),), -torch.inf)
    if shard.true_width == 0:
        return torch.stack([nowhere_C] * (1 + own_normaliser))
    found_C = s_CV.gather(1, local_C.clamp(0, shard.true_width - 1)[:, None]).squeeze(1)
    rows = [torch.where(is_here_C, found_C, nowhere_C)]
    if own_normaliser:
        rows.append(torch.cat([tile.logsumexp(-1) for tile in s_CV.split(tile_tokens)]))
    return torch.stack(rows)


def log_normaliser(stats_PKR: Tensor) -> Tensor:
    """Logarithm of Σ exp over the full vocabulary [R], from `closed_form.shard_stats` of all shards."""
    return (stats_PKR[:, 0] + stats_PKR[:, 2].log()).logsumexp(0)


def merge_token_stats(token_stats_PKC: Tensor, log_normaliser_C: Tensor) -> Tensor:
    """Log-probabilities [C] from `token_stats` of all shards.

    Args:
        token_stats_PKC: gathered `token_stats`.
        log_normaliser_C: log-normaliser of the loss; used if `token_stats` does not include one.
    """
    if token_stats_PKC.shape[1] == 2:
        log_normaliser_C = token_stats_PKC[:, 1].logsumexp(0)
    return token_stats_PKC[:, 0].amax(0) - log_normaliser_C
