"""Compares the error that FP8 in the frozen passes causes in the target with the distilled effect.

Distances between distributions are total variations, averaged over response tokens. The *error* is the distance between
the target with FP8 and the target in the model's precision. The *effect* is the distance between the latter and the
base. If the error is larger than the effect, the student distils noise.

Shapes: N response tokens, C tokens of a chunk, H hidden size, v true vocabulary entries of this rank's shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_popsd.diagnosis.config import DiagnosisSettings
from nemo_popsd.diagnosis.forwards import RowRollout, equal_counts, hidden_states, token_batches
from nemo_popsd.diagnosis.fp8_rounding import emulated
from nemo_popsd.diagnosis.tokens import logits_of
from nemo_popsd.distillation import Target
from nemo_popsd.distillation.definition import Branches, log_softmax, target_from_log_probs
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.collectives import reduce_sum_
from nemo_popsd.parallel.distributed import device
from nemo_popsd.training.trajectory import Trajectory

Distributions = tuple[Tensor, Tensor]
"""Log-probabilities of base and target, [N, v] each."""


@dataclass(frozen=True)
class TargetError:
    """The errors of one FP8 recipe of the frozen passes, averaged over tokens."""

    recipe: str
    """Name of the recipe."""
    tokens: int
    """Number of response tokens."""
    base_error: float
    """Distance between the base with FP8 and the base in the model's precision."""
    error: float
    """Distance between the target with FP8 and the target in the model's precision."""
    effect: float
    """Distance between target and base in the model's precision."""
    larger: float
    """Share of tokens whose error is larger than their effect."""

    @classmethod
    def of(cls, recipe: str, sums: Sequence[float]) -> TargetError:
        """Computes the errors from the sums that `error_sums` returns."""
        tokens = max(1, int(sums[-1]))
        return cls(recipe, int(sums[-1]), *(value / tokens for value in sums[:-1]))

    @property
    def ratio(self) -> float:
        """Ratio of error to effect."""
        return self.error / self.effect if self.effect else math.inf

    def sentence(self) -> str:
        """The result in words."""
        return (
            f"{self.recipe}: the target's error is {self.error:.4f}, {self.ratio:.2f} of the effect {self.effect:.4f}, "
            f"and larger than the effect at {self.larger:.0%} of {self.tokens:,} tokens"
        )


def error_sums(measured: Distributions, exact: Distributions, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums over N tokens, float64 [5]: base error, error, effect, number of tokens with a larger error, and N.

    One all-reduce of [3, N] over `group`, over which the vocabulary is sharded.
    """
    pairs = (measured[0], exact[0]), (measured[1], exact[1]), (exact[1], exact[0])
    distances = torch.stack([(a.exp() - b.exp()).abs().sum(-1, dtype=torch.float64) / 2 for a, b in pairs])
    base_error, error, effect = reduce_sum_(distances, group)
    larger, count = (error > effect).double().sum(), torch.ones_like(error).sum()
    return torch.stack([base_error.sum(), error.sum(), effect.sum(), larger, count])


@torch.no_grad()
def target_errors(
    student: Student, rollouts: Sequence[RowRollout], settings: DiagnosisSettings, recipes: Sequence[str]
) -> list[TargetError]:
    """The errors of each of `recipes`, emulated, on the tokens of all ranks' rollouts. Collective over the world.

    The base replaces the student in targets that depend on the student. One all-reduce of [recipes, 5] over the world
    in addition to the collectives of the forwards and of the distributions.

    Args:
        student: a student with local layers.
        rollouts: rollouts of this data-parallel rank.
        settings: settings of the diagnosis.
        recipes: keys of `nemo_popsd.diagnosis.fp8_rounding.ROUNDINGS`.

    Returns:
        The errors of each recipe, the same on every rank.
    """
    target, weight = build_target(settings.target), student.base_weight if student.holds_output else None
    sums = torch.zeros(len(recipes), 5, dtype=torch.float64)
    for batch in equal_counts(student, token_batches(rollouts, settings.frozen_tokens)):
        trajectories = [rollout.trajectory for rollout in batch]
        exact = _states(student, trajectories, settings)
        for index, recipe in enumerate(recipes):
            measured = _states(student, trajectories, settings, recipe)
            if weight is None or not exact:
                continue
            for start in range(0, len(exact[0]), settings.diagnosis.chunk_tokens):
                chunk = slice(start, start + settings.diagnosis.chunk_tokens)
                rounded, right = (
                    _distributions([x[chunk] for x in states], weight, student, target) for states in (measured, exact)
                )
                found = error_sums(rounded, right, student.vocab_shard.group).cpu()
                sums[index] += found if student.owns_loss else 0
    on_device = sums.to(device())
    dist.all_reduce(on_device)
    return [TargetError.of(recipe, values) for recipe, values in zip(recipes, on_device.tolist(), strict=True)]


def layer_linears(chunks: Sequence[ModelChunk]) -> list[nn.Module]:
    """The linear modules of all layers of a model with local layers, without adapters."""
    named = [pair for chunk in chunks for pair in chunk.decoder.layers.named_modules()]
    return [
        module
        for name, module in named
        if "linear_" in name and ".adapter" not in name and "weight" in dict(module.named_parameters(recurse=False))
    ]


def _states(
    student: Student, trajectories: Sequence[Trajectory], settings: DiagnosisSettings, recipe: str | None = None
) -> list[Tensor]:
    """States of base, privileged teacher and reference-only teacher, [N, H] each, at the tokens that this rank owns.

    An empty list except on the last pipeline stage.
    """
    contexts = [[getattr(t, name) for t in trajectories] for name in ("student", "privileged", "reference")]
    with student.base.model() as base, emulated(layer_linears(base), recipe) if recipe else nullcontext():
        states = hidden_states(base, [sequence for part in contexts for sequence in part], settings)
    count = len(trajectories)
    return [torch.cat(states[i * count : (i + 1) * count]) for i in range(3)] if states else []


def _distributions(states: Sequence[Tensor], weight: Tensor, student: Student, target: Target) -> Distributions:
    """Log-probabilities of base and target at C tokens, [C, v] each in fp32."""
    shard = student.vocab_shard
    matrix = weight[: shard.true_width]
    logs = [log_softmax(logits_of(h, matrix, torch.float32, target.temperature), shard.group) for h in states]
    base, privileged, reference = logs
    branches = Branches(base, base=base, privileged=privileged, reference=reference)
    return base, target_from_log_probs(branches, target=target, shard=shard)
