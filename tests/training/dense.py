"""A complete step by the paper's equations, on Hugging Face models in float64: one forward per context, all logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_popsd.distillation.config import TokensConfig
from nemo_popsd.training.trajectory import Trajectory
from tests.tiny_models import load_dense


@dataclass
class DenseStep:
    """The expected results of a step."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    weighted_share: float
    """Share of the tokens that count."""


def dense_step(
    live: Path,
    base: Path,
    trajectories: Sequence[Trajectory],
    *,
    loss_mean: str,
    beta: float = 1.0,
    cap: float = 10.0,
    tokens: TokensConfig | None = None,
    teacher: Path | None = None,
) -> DenseStep:
    """Loss, gradient of every tensor of `live`, and the metrics of the step with all tokens diagnosed.

    `teacher` has the weights of both teachers; the default is `base`. With `tokens`, the loss is weighted: even tokens
    are markers, and a response is right if it begins with an even token.
    """
    student, frozen = load_dense(live, torch.float64), load_dense(base, torch.float64).requires_grad_(False)
    teaching = frozen if teacher is None else load_dense(teacher, torch.float64).requires_grad_(False)
    per_sequence, rows, weights, counted = [], [], [], []
    for t in trajectories:
        answer, contexts = t.rollout.response, t.row.contexts
        log_student = response_log_probs(student, contexts.student, answer)
        log_base = response_log_probs(frozen, contexts.student, answer)
        log_privileged = response_log_probs(teaching, contexts.privileged, answer)
        log_reference = response_log_probs(teaching, contexts.reference, answer)
        delta = log_privileged - log_reference  # (13)
        delta = delta - delta.mean(-1, keepdim=True)  # (14)
        delta = cap * torch.tanh(delta / cap)  # (15)
        log_target = torch.log_softmax(log_base + delta / beta, -1)  # (16, 17)
        p, q = log_student.exp(), log_target.exp()
        log_mixture = (0.5 * p + 0.5 * q).log()
        jsd = 0.5 * (q * (log_target - log_mixture)).sum(-1) + 0.5 * (p * (log_student - log_mixture)).sum(-1)  # (18)
        gate = torch.ones_like(jsd, dtype=torch.bool)
        if tokens is not None:
            entropies = [-(x * x.log()).sum(-1) for x in (p, q)]
            gate = p.amax(-1) <= tokens.max_student_probability
            gate &= (entropies[0] >= tokens.min_student_entropy) & (entropies[1] >= tokens.min_target_entropy)
        weights.append(_weights(t, tokens or TokensConfig()))
        counted.append(gate * weights[-1][1] > 0)
        per_sequence.append(jsd * gate)
        with torch.no_grad():
            total, question = log_privileged - log_student, log_privileged - log_reference
            induced = log_reference - log_student
            rows.append(
                torch.stack(
                    [
                        (q * (log_target - log_student)).sum(-1),
                        (p * (log_student - log_target)).sum(-1),
                        -(p * log_student).sum(-1),
                        -(q * log_target).sum(-1),
                        induced.norm(dim=-1) / total.norm(dim=-1),
                        torch.cosine_similarity(total, question, dim=-1),
                        torch.cosine_similarity(total, induced, dim=-1),
                    ]
                )
            )
    if loss_mean == "sequence":
        means = torch.stack([(w * x).sum() / w.sum() for (_, w), x in zip(weights, per_sequence, strict=True)])
        of_responses = torch.tensor([u for u, _ in weights]).double()
        loss = (of_responses * means).sum() / of_responses.sum()
    else:
        of_tokens = torch.cat([u * w for u, w in weights])
        loss = (of_tokens * torch.cat(per_sequence)).sum() / of_tokens.sum()
    loss.backward()
    names = ("forward_kl", "reverse_kl", "student_entropy", "target_entropy")
    names += ("norm_ratio", "cosine_question", "cosine_reference")
    metrics = dict(zip(names, torch.cat(rows, dim=1).mean(1).tolist(), strict=True))
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return DenseStep(float(loss.detach()), gradients, metrics, float(torch.cat(counted).double().mean()))


def _weights(t: Trajectory, tokens: TokensConfig) -> tuple[float, Tensor]:
    """Weight of a response, and weights of its tokens."""
    response = t.rollout.response
    of_tokens = [
        (tokens.markers if token % 2 == 0 else 1.0)
        * (0.0 if tokens.horizon and position >= tokens.horizon else 1.0)
        * (0.5 ** (position / tokens.half_life) if tokens.half_life else 1.0)
        for position, token in enumerate(response)
    ]
    of_response = tokens.right if response[0] % 2 == 0 else tokens.wrong
    of_response *= tokens.truncated if t.rollout.truncated else 1.0
    return of_response, torch.tensor(of_tokens, dtype=torch.float64)


def response_log_probs(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [R, V] at the tokens of `answer` after `prompt`, each given the tokens before it."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    rows = [logits[len(prompt) + number - 1] for number in range(len(answer))]
    return torch.log_softmax(torch.stack(rows).double(), -1)
