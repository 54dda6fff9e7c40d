"""The compared forms of the loss: that of this package, and others implemented from published mathematics.

All compute the weighted sum of divergences from hidden states and output matrix, and its gradients dh and dW.

Legend: T tokens, V vocabulary entries of this shard, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_popsd.distillation import (
    Branches,
    Divergence,
    HiddenPair,
    MainGradient,
    Target,
    hidden_pair,
    loss_from_hidden,
    loss_from_logits,
)
from nemo_popsd.distillation.definition import log_softmax
from nemo_popsd.parallel.collectives import gather_shards, sum_for_replicas, sum_for_shards
from nemo_popsd.parallel.vocabulary import VocabShard, mean_output_vector

PEERS_CHUNK = 512
"""Tokens per chunk in the chunked forms, as in released implementations."""
TOP_K = 64


@dataclass
class Problem:
    """One micro-batch: states [T, H] of the four branches, one output matrix [V, H], weights [T], as under LoRA.

    `trained`: whether the matrix has a gradient, as in the first step of full fine-tuning.
    """

    student: Tensor
    base: Tensor
    privileged: Tensor
    reference: Tensor
    weight: Tensor
    token_weights: Tensor
    target: Target
    divergence: Divergence
    trained: bool
    group: dist.ProcessGroup | None = None

    @property
    def vocab_size(self) -> int:
        """Vocabulary size without padding, over all shards."""
        return self.weight.shape[0] * (1 if self.group is None else self.group.size())

    @property
    def shard(self) -> VocabShard:
        """This rank's shard of the vocabulary."""
        return VocabShard(self.vocab_size, self.weight.shape[0], self.group)

    @property
    def vectors(self) -> HiddenPair:
        """The vectors of the target."""
        return hidden_pair(self.target, base=self.base, privileged=self.privileged, reference=self.reference)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Student states and matrix as leaves without a gradient."""
        return self.student.detach().requires_grad_(), self.weight.detach().requires_grad_(self.trained)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another precision."""
        fields = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Problem(**fields)

    def on(self, device: torch.device) -> Problem:
        """The same values on a device."""
        fields = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Problem(**fields)


@dataclass
class Outcome:
    """The result of a form."""

    total: Tensor
    dh: Tensor
    dw: Tensor | None


def make_problem(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    cap: float | None = 10.0,
    kind: str = "jsd",
    trained: bool = True,
    group: dist.ProcessGroup | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """A random problem whose logits have a standard deviation of about 3; the same states on every shard.

    Generated on `device`: a GPU's random numbers differ from those of the CPU.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    base = normal(tokens, hidden)
    states = {name: base + 0.3 * normal(tokens, hidden) for name in ("student", "privileged", "reference")}
    if group is not None:
        generator.manual_seed(1 + group.rank())
    return Problem(
        **states,
        base=base,
        weight=normal(vocab, hidden) * 3 / hidden**0.5,
        token_weights=torch.full((tokens,), 1 / tokens, device=device),
        target=Target.purified(cap=cap),
        divergence=Divergence(kind),
        trained=trained,
        group=group,
    )


class PackageLoss:
    """`loss_from_hidden` as training calls it: w̄ known, dW added to a gradient that the trainer keeps.

    The trainer clears it once per step, so the dW of the first call is correct, and later calls add to it.
    """

    def __init__(self, problem: Problem, *, fused: str = "auto", chunk_tokens: int | None = None) -> None:
        self._problem, self._fused, self._chunk_tokens = problem, fused, chunk_tokens
        self._centre = mean_output_vector(problem.weight, problem.shard)
        dtype = torch.float64 if problem.weight.dtype == torch.float64 else torch.float32
        self._kept = torch.zeros_like(problem.weight, dtype=dtype) if problem.trained else None

    def __call__(self) -> Outcome:
        """Forward and backward."""
        problem = self._problem
        hidden, weight = problem.leaves()
        result = loss_from_hidden(
            hidden,
            weight,
            problem.vectors,
            problem.weight,
            target=problem.target,
            divergence=problem.divergence,
            shard=problem.shard,
            token_weights=problem.token_weights,
            chunk_tokens=self._chunk_tokens,
            centre=self._centre,
            fused=self._fused,
            main_gradient=None if self._kept is None else MainGradient(self._kept, 1.0),
        )
        result.total.backward()
        assert hidden.grad is not None
        return Outcome(result.total.detach(), hidden.grad, self._kept)


def _losses(problem: Problem, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Four logits, their log-softmaxes, the target and the divergence, all under autograd: [C]."""
    frozen = {name: getattr(problem, name)[rows] @ problem.weight.t() for name in ("base", "privileged", "reference")}
    return loss_from_logits(
        Branches(hidden @ weight.t(), **frozen),
        target=problem.target,
        divergence=problem.divergence,
        shard=problem.shard,
    )


def _top_k_losses(problem: Problem, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """The divergence on the target's `TOP_K` most likely entries, with both distributions renormalised: [C]."""
    with torch.no_grad():
        h_T, h_ref, h_0 = (x[rows] for x in (problem.privileged, problem.reference, problem.base))
        delta = log_softmax(h_T @ problem.weight.t(), problem.group)
        delta -= log_softmax(h_ref @ problem.weight.t(), problem.group)
        if problem.target.cap is not None:
            mean = sum_for_replicas(delta.sum(-1, keepdim=True), problem.group) / problem.vocab_size
            delta = problem.target.cap * torch.tanh((delta - mean) / problem.target.cap)
        log_q = log_softmax(h_0 @ problem.weight.t(), problem.group).add_(delta, alpha=problem.target.privileged)
        values, index = log_q.topk(TOP_K, -1)
        everywhere = torch.cat(list(gather_shards([values], problem.group)[0]), -1)
        chosen = values >= everywhere.topk(TOP_K, -1).values[:, -1:]
        log_q = values.masked_fill(~chosen, -torch.inf)
        log_q = log_softmax(log_q, problem.group)
    log_p = (hidden @ weight.t()).gather(-1, index).masked_fill(~chosen, -torch.inf)
    peak = gather_shards([log_p.detach().amax(-1, keepdim=True)], problem.group)[0].amax(0)
    log_p = log_p - peak - sum_for_shards((log_p - peak).exp().sum(-1, keepdim=True), problem.group).log()
    p, q = (torch.where(chosen, x, 0.0).exp() * chosen for x in (log_p, log_q))
    log_p, log_q = (torch.where(chosen, x, 0.0) for x in (log_p, log_q))
    if problem.divergence.kind == "forward_kl":
        terms = q * (log_q - log_p)
    elif problem.divergence.kind == "reverse_kl":
        terms = p * (log_p - log_q)
    else:
        w = problem.divergence.weight
        log_m = (w * q + (1 - w) * p).clamp_min(1e-38).log()
        terms = w * q * (log_q - log_m) + (1 - w) * p * (log_p - log_m)
    return sum_for_replicas(terms.sum(-1), problem.group)


class UnderAutograd:
    """A form whose gradients autograd computes."""

    def __init__(
        self,
        problem: Problem,
        losses: Callable[..., Tensor] = _losses,
        *,
        chunk_tokens: int | None = None,
        recompute: bool = False,
    ) -> None:
        self._problem, self._losses = problem, losses
        self._chunk_tokens, self._recompute = chunk_tokens, recompute

    def __call__(self) -> Outcome:
        """Forward and backward."""
        problem = self._problem
        hidden, weight = problem.leaves()
        tokens = len(hidden)
        step = self._chunk_tokens or tokens
        total = hidden.new_zeros((), dtype=problem.token_weights.dtype)
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            arguments = (problem, hidden[rows], weight, rows)
            losses = (
                checkpoint(self._losses, *arguments, use_reentrant=False)
                if self._recompute
                else self._losses(*arguments)
            )
            total = total + (losses * problem.token_weights[rows]).sum()
        total.backward()
        if problem.group is not None:  # as a column-parallel output layer does in its backward pass
            dist.all_reduce(hidden.grad, group=problem.group)
        assert hidden.grad is not None
        return Outcome(total.detach(), hidden.grad, weight.grad)


def forms(problem: Problem) -> dict[str, Callable[[], Outcome]]:
    """All compared forms by name."""
    return {
        "nemo_popsd": PackageLoss(problem),
        "nemo_popsd, not fused": PackageLoss(problem, fused="never"),
        "dense, four logits, autograd": UnderAutograd(problem),
        "chunks under autograd": UnderAutograd(problem, chunk_tokens=PEERS_CHUNK),
        "chunks, recomputed in backward": UnderAutograd(problem, chunk_tokens=PEERS_CHUNK, recompute=True),
        f"top-{TOP_K} (an approximation)": UnderAutograd(problem, _top_k_losses, chunk_tokens=PEERS_CHUNK),
    }


class Products:
    """Only the matrix products that every exact form needs, into allocated memory.

    One product for each vector of a token (student, h_0 and, with a cap, d), stacked because they share the matrix; one
    for dh; one for dW if it is requested.
    """

    def __init__(self, problem: Problem, chunk_tokens: int) -> None:
        self._problem = problem
        pair = problem.vectors
        vectors = [problem.student, *(x.to(problem.weight.dtype) for x in pair if x is not None)]
        starts = range(0, len(problem.student), chunk_tokens)
        self._chunks = [slice(start, start + chunk_tokens) for start in starts]
        self._states = [torch.cat([x[rows] for x in vectors]) for rows in self._chunks]
        self._logits = problem.weight.new_empty(len(self._states[0]), problem.weight.shape[0])
        self._gradient = torch.randn_like(self._logits[: len(problem.student[self._chunks[0]])])
        self._dh = torch.empty_like(problem.student)
        self._dw = torch.zeros_like(problem.weight) if problem.trained else None

    def __call__(self) -> None:
        """All products, chunk by chunk."""
        problem = self._problem
        for rows, states in zip(self._chunks, self._states, strict=True):
            torch.mm(states, problem.weight.t(), out=self._logits[: len(states)])
            gradient = self._gradient[: len(problem.student[rows])]
            torch.mm(gradient, problem.weight, out=self._dh[rows])
            if self._dw is not None:
                self._dw.addmm_(gradient.t(), problem.student[rows])


class CudaProducts(Products):
    """`Products` on a GPU: logits and dW in fp32, as in the form of this package."""

    def __init__(self, problem: Problem, chunk_tokens: int) -> None:
        super().__init__(problem, chunk_tokens)
        self._logits = self._logits.float()
        self._sum = torch.zeros_like(problem.weight, dtype=torch.float32)

    def __call__(self) -> None:
        """All products, chunk by chunk."""
        problem = self._problem
        for rows, states in zip(self._chunks, self._states, strict=True):
            torch.mm(states, problem.weight.t(), out_dtype=torch.float32, out=self._logits[: len(states)])
            gradient = self._gradient[: len(problem.student[rows])]
            torch.mm(gradient, problem.weight, out=self._dh[rows])
            torch.addmm(self._sum, gradient.t(), problem.student[rows], out_dtype=torch.float32, out=self._sum)
