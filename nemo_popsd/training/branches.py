"""The frozen branches: what base, privileged teacher and reference-only teacher say of each response token.

All are the same weights θ₀ on different contexts, so the contexts of all rollouts go through the model together,
in as few forwards as the token budget allows. What is kept is hidden states, never logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_popsd.distillation import DiagnosedTokens, FrozenStates, Target, frozen_states
from nemo_popsd.megatron.base import FrozenBase
from nemo_popsd.megatron.forward import frozen_hidden_states
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class TargetStates:
    """What determines the target distribution at each of a trajectory's R response tokens."""

    frozen: FrozenStates
    """[R, H] each."""
    diagnosed: DiagnosedTokens | None
    """Tokens sampled for diagnosis."""


class FrozenBranches:
    """Runs the branches that a target needs."""

    def __init__(
        self,
        base: FrozenBase,
        target: Target,
        *,
        token_budget: int,
        diagnosed_tokens: int,
        soft_cap: float | None = None,
    ) -> None:
        """Keeps references only.

        Args:
            base: the frozen weights.
            target: branches whose coefficient is 0 are not run.
            token_budget: padded tokens of one forward.
            diagnosed_tokens: response tokens per call to keep for diagnosis, which needs both teachers.
            soft_cap: of the model's final logits, or None.
        """
        self._soft_cap = soft_cap
        self._base = base
        self._target = target
        self._token_budget = token_budget
        self._diagnosed_tokens = diagnosed_tokens

    def target_states(self, trajectories: Sequence[Trajectory]) -> list[TargetStates]:
        """Target states of each trajectory, detached. Collectives: those of Megatron's forwards."""
        branches: dict[str, list[Tensor]] = {}
        wanted = self._wanted_branches()
        contexts = {
            "base": [t.student for t in trajectories],
            "privileged": [t.privileged for t in trajectories],
            "reference": [t.reference for t in trajectories],
        }
        sequences = [sequence for name in wanted for sequence in contexts[name]]
        with self._base.model() as model:
            hidden = frozen_hidden_states(model, sequences, self._token_budget)
        for number, name in enumerate(wanted):
            branches[name] = hidden[number * len(trajectories) : (number + 1) * len(trajectories)]
        diagnosed = self._sample([len(t.rollout.response) for t in trajectories])
        states = []
        for row in range(len(trajectories)):
            base, privileged, reference = (
                branches[name][row] if name in branches else None for name in ("base", "privileged", "reference")
            )
            frozen = frozen_states(self._target, base, privileged, reference, soft_cap=self._soft_cap)
            tokens = None
            if diagnosed is not None:
                assert privileged is not None
                assert reference is not None
                index = diagnosed[row].to(privileged.device)
                tokens = DiagnosedTokens(index, privileged[index], reference[index])
            states.append(TargetStates(frozen, tokens))
        return states

    def _wanted_branches(self) -> list[str]:
        target, diagnoses = self._target, self._diagnosed_tokens > 0
        wanted = {
            "base": target.base != 0,
            "privileged": target.privileged != 0 or diagnoses,
            "reference": target.reference != 0 or diagnoses,
        }
        return [name for name, needed in wanted.items() if needed]

    def _sample(self, lengths: Sequence[int]) -> list[Tensor] | None:
        """Response tokens evenly spaced over all trajectories, by trajectory; the same at every run."""
        total = sum(lengths)
        count = min(self._diagnosed_tokens, total)
        if not self._diagnosed_tokens:
            return None
        chosen = torch.zeros(total, dtype=torch.bool)
        if count:
            chosen[torch.arange(count) * total // count] = True
        return [part.nonzero().squeeze(1) for part in chosen.split(list(lengths))]
