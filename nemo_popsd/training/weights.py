"""Weights of the response tokens in the loss that are known before the forward pass.

With u_i the weight of response i, w_it the weight of its token t, and D_it its divergence, the loss over all ranks is

    sequence:  Σ_i u_i · (Σ_t w_it·D_it / Σ_t w_it) / Σ_i u_i     over responses with Σ_t w_it > 0
    token:     Σ_i Σ_t u_i·w_it·D_it / Σ_i Σ_t u_i·w_it

Without weights these are the mean over tokens and then over responses (as in the paper), and the mean over all tokens
(as in OPSD).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.config import TokensConfig
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class ResponseWeights:
    """The weights of one response."""

    response: float
    """Weight u of the response."""
    tokens: Tensor
    """Weights w of its tokens [R], float64, on the CPU."""


def response_weights(
    trajectory: Trajectory, settings: TokensConfig, marked: Callable[[Sequence[int]], Sequence[bool]]
) -> ResponseWeights:
    """The weights of a trajectory by `settings`.

    Args:
        trajectory: the trajectory; `right` must be set if weights depend on the answer.
        settings: token weights.
        marked: returns whether each token belongs to an epistemic marker; called only if their weight is not 1.
    """
    response = trajectory.rollout.response
    tokens = torch.ones(len(response), dtype=torch.float64)
    position = torch.arange(len(response), dtype=torch.float64)
    if settings.half_life:
        tokens *= torch.exp2(-position / settings.half_life)
    if settings.horizon:
        tokens *= position < settings.horizon
    if settings.markers != 1:
        tokens[torch.tensor(list(marked(response)), dtype=torch.bool)] *= settings.markers
    weight = settings.truncated if trajectory.rollout.truncated else 1.0
    if settings.by_answer:
        assert trajectory.right is not None
        weight *= settings.right if trajectory.right else settings.wrong
    return ResponseWeights(weight, tokens)


def shares(
    weights: Sequence[ResponseWeights], loss_mean: str, group: dist.ProcessGroup, device: torch.device
) -> list[Tensor]:
    """Factors of the divergence of each token: float64 [R] for each of this rank's responses, on the CPU.

    The global loss is the sum over ranks of Σ share · divergence. The shares of all ranks sum to 1, or are all 0 if no
    token of any rank has a nonzero weight. One all-reduce of two numbers.

    Args:
        weights: weights of this rank's responses.
        loss_mean: `sequence` or `token`.
        group: data-parallel group.
        device: device of the group's collectives.
    """
    sums = torch.tensor([float(w.tokens.sum()) for w in weights], dtype=torch.float64)
    responses = torch.tensor([w.response for w in weights], dtype=torch.float64)
    totals = torch.stack([responses[sums > 0].sum(), (responses * sums).sum()]).to(device)
    dist.all_reduce(totals, group=group)
    of_responses, of_tokens = totals.where(totals > 0, 1.0).tolist()
    if loss_mean == "token":
        return [w.response * w.tokens / of_tokens for w in weights]
    # A response without weights keeps its shares of 0.
    own = sums.where(sums > 0, 1.0).tolist()
    return [w.response * w.tokens / (of_responses * total) for w, total in zip(weights, own, strict=True)]
