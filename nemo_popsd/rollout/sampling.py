"""Drawing tokens from logits: temperature, top-k, top-p, one uniform number per token.

Shapes: B rows, V true vocabulary, K candidates (k of top-k, or V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_popsd.rollout.engine import SamplingParams


def uniforms(seeds: list[int], tokens: int) -> Tensor:
    """Random numbers in [0, 1) for `tokens` draws of each row: [B, tokens] float64 on the CPU.

    Each row has a generator of its own, so its numbers depend on its seed alone.
    """
    rows = [torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def sample(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> Tensor:
    """Draws one token per row by inverting the distribution function of the filtered, tempered softmax.

    Filters in the usual order: temperature, then top-k, then top-p on what is left; the most likely token always
    stays. Candidates are laid out by falling probability, so the draw changes with the uniform number alone.

    Args:
        logits: [B, V] over the true vocabulary, any float dtype; computed in fp32, summed in float64.
        sampling: temperature 0 takes the most likely token.
        uniform: [B] in [0, 1), on the logits' device.

    Returns:
        [B] int64 token ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled_BV = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        scaled_BK, candidates_BK = scaled_BV.topk(sampling.top_k, dim=-1)
    else:
        scaled_BK, candidates_BK = scaled_BV.sort(dim=-1, descending=True)
    mass_BK = scaled_BK.softmax(dim=-1).double().cumsum(dim=-1)
    if sampling.top_p < 1:
        # A candidate stays when the mass before it has not reached top_p; so the first always stays.
        total_B = (mass_BK < sampling.top_p).sum(dim=-1, keepdim=True).clamp_(max=mass_BK.shape[-1] - 1)
        threshold_B = uniform[:, None] * mass_BK.gather(-1, total_B)
    else:
        threshold_B = uniform[:, None] * mass_BK[:, -1:]
    chosen_B = (mass_BK <= threshold_B).sum(dim=-1, keepdim=True).clamp_(max=mass_BK.shape[-1] - 1)
    return candidates_BK.gather(-1, chosen_B).squeeze(-1)


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each row's token under the unfiltered softmax at temperature 1.

    Args:
        logits: [B, V] over the true vocabulary.
        tokens: [B].

    Returns:
        [B] fp32.
    """
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
