"""The loss from the paper's equations on dense float64 tensors, with autograd. It shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.parallel.vocabulary import VocabShard


@dataclass(frozen=True)
class Problem:
    """Hidden states [N, H] of the four contexts, and two output matrices [V_pad, H] with junk from row `vocab` on."""

    student: Tensor
    base: Tensor
    privileged: Tensor
    reference: Tensor
    student_weight: Tensor
    teacher_weight: Tensor
    token_weights: Tensor
    vocab: int

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def shard(self, rank: int, size: int) -> Problem:
        width = self.student_weight.shape[0] // size
        rows = slice(rank * width, (rank + 1) * width)
        return replace(self, student_weight=self.student_weight[rows], teacher_weight=self.teacher_weight[rows])

    def vocab_shard(self, group: dist.ProcessGroup | None = None) -> VocabShard:
        return VocabShard(self.vocab, self.student_weight.shape[0], group)


def make_problem(
    seed: int = 0,
    tokens: int = 7,
    hidden: int = 8,
    vocab: int = 29,
    padded: int = 32,
    sharpness: float = 1.0,
    junk: float = 5.0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix() -> Tensor:
        weight = normal(padded, hidden) * sharpness
        weight[vocab:] = junk
        return weight

    return Problem(
        student=normal(tokens, hidden),
        base=normal(tokens, hidden),
        privileged=normal(tokens, hidden),
        reference=normal(tokens, hidden),
        student_weight=matrix(),
        teacher_weight=matrix(),
        token_weights=torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1,
        vocab=vocab,
    )


def log_probs(hidden: Tensor, weight: Tensor, vocab: int, temperature: float) -> Tensor:
    return torch.log_softmax(hidden.double() @ weight.double()[:vocab].T / temperature, -1)


def target_log_probs(problem: Problem, target, log_student: Tensor) -> Tensor:
    def frozen(hidden: Tensor) -> Tensor:
        return log_probs(hidden, problem.teacher_weight, problem.vocab, target.temperature)

    log_teacher, log_reference, log_base = frozen(problem.privileged), frozen(problem.reference), frozen(problem.base)
    anchor = target.student * log_student + target.base * log_base
    if target.cap is None:
        return torch.log_softmax(anchor + target.privileged * log_teacher + target.reference * log_reference, -1)
    delta = log_teacher - log_reference
    centred = delta - delta.mean(-1, keepdim=True)
    capped = target.cap * torch.tanh(centred / target.cap)
    return torch.log_softmax(anchor + capped * target.privileged, -1)


def divergence_value(p: Tensor, q: Tensor, kind: str, weight: float, clip: float | None = None) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return a * (a.log() - b.log())

    mixture = weight * q + (1 - weight) * p
    entries = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: weight * kl(q, mixture) + (1 - weight) * kl(p, mixture),
    }[kind]()
    return (entries if clip is None else entries.clamp(max=clip)).sum(-1)


@dataclass(frozen=True)
class Dense:
    loss: Tensor  # [N]
    dh: Tensor  # [N, H]
    dw: Tensor  # [V_pad, H]
    dz: Tensor  # [N, V_pad], with respect to the logits before the temperature
    p: Tensor
    q: Tensor


def dense(problem: Problem, target, divergence) -> Dense:
    problem = problem.to(torch.float64)
    hidden = problem.student.clone().requires_grad_()
    weight = problem.student_weight.clone().requires_grad_()
    logits = hidden @ weight.T
    logits.retain_grad()
    log_p = torch.log_softmax(logits[:, : problem.vocab] / target.temperature, -1)
    q = target_log_probs(problem, target, log_p.detach()).exp()
    loss = divergence_value(log_p.exp(), q, divergence.kind, divergence.weight, divergence.clip)
    (loss * problem.token_weights).sum().backward()
    return Dense(loss.detach(), hidden.grad, weight.grad, logits.grad, log_p.detach().exp(), q)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest entry."""
    if want.numel() == 0:
        return 0.0 if got.shape == want.shape else float("inf")
    assert got.shape == want.shape, (got.shape, want.shape)
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()
