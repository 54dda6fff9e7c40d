"""The frozen branches: what base, privileged teacher and reference-only teacher say of each response token.

All are the same weights θ₀ on different contexts, so the contexts of all rollouts go through the model together,
in as few forwards as the token budget allows. What is kept is hidden states, never logits: under context parallelism
those of the tokens that this rank owns, on the last pipeline stage alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_popsd.distillation import DiagnosedTokens, FrozenStates, Target, frozen_states
from nemo_popsd.megatron.base import FrozenBase
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.microbatches import TokenCount
from nemo_popsd.megatron.response_routing import SequenceSplit
from nemo_popsd.training.trajectory import Trajectory


@dataclass(frozen=True)
class TargetStates:
    """What determines the target distribution at each of the R response tokens that this rank owns of a trajectory."""

    frozen: FrozenStates
    """[R, H] each."""
    diagnosed: DiagnosedTokens | None
    """Tokens sampled for diagnosis."""

    def on_host(self) -> TargetStates:
        """The same in host memory, pinned where there is a GPU."""
        tokens = self.diagnosed
        if tokens is not None:
            tokens = replace(tokens, privileged=_to_host(tokens.privileged), reference=_to_host(tokens.reference))
        frozen = type(self.frozen)(*(None if part is None else _to_host(part) for part in self.frozen))
        return TargetStates(frozen, tokens)


def _to_host(states: Tensor) -> Tensor:
    if not states.is_cuda:
        return states
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)


class FrozenBranches:
    """Runs the branches that a target needs.

    Attributes:
        computed: tokens that went through the base in the last call, over all ranks that shared them.
    """

    def __init__(
        self,
        base: FrozenBase,
        target: Target,
        *,
        token_budget: int,
        diagnosed_tokens: int,
        soft_cap: float | None = None,
        packed: bool = False,
        on_host: bool = False,
    ) -> None:
        """Keeps references only.

        Args:
            base: the frozen weights.
            target: branches whose coefficient is 0 are not run.
            token_budget: tokens of one forward, padding included.
            diagnosed_tokens: response tokens per call to keep for diagnosis, which needs both teachers.
            soft_cap: of the model's final logits, or None.
            packed: contexts one after the other instead of side by side.
            on_host: keep the states in host memory until the loss asks for them.
        """
        self._soft_cap = soft_cap
        self._base = base
        self._target = target
        self._token_budget = token_budget
        self._diagnosed_tokens = diagnosed_tokens
        self._packed = packed
        self._on_host = on_host
        self.computed = TokenCount()

    def target_states(self, trajectories: Sequence[Trajectory]) -> list[TargetStates]:
        """Target states of each trajectory, detached; none but on the last pipeline stage.

        Collectives: those of Megatron's forwards and of `gather_response_states`.
        """
        branches: dict[str, list[Tensor]] = {}
        wanted = self._wanted_branches()
        contexts = {
            "base": [t.student for t in trajectories],
            "privileged": [t.privileged for t in trajectories],
            "reference": [t.reference for t in trajectories],
        }
        sequences = [sequence for name in wanted for sequence in contexts[name]]
        with self._base.model() as chunks:
            batches = student_batches(chunks, sequences, self._token_budget, packed=self._packed)
            hidden = frozen_hidden_states(chunks, batches)
            split = SequenceSplit.of(chunks[0])
        self.computed = TokenCount.of(batches)
        if not hidden:
            return []
        for number, name in enumerate(wanted):
            branches[name] = hidden[number * len(trajectories) : (number + 1) * len(trajectories)]
        diagnosed = self._sample(trajectories, split)
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
        return [state.on_host() for state in states] if self._on_host else states

    def _wanted_branches(self) -> list[str]:
        target, diagnoses = self._target, self._diagnosed_tokens > 0
        wanted = {
            "base": target.base != 0,
            "privileged": target.privileged != 0 or diagnoses,
            "reference": target.reference != 0 or diagnoses,
        }
        return [name for name, needed in wanted.items() if needed]

    def _sample(self, trajectories: Sequence[Trajectory], split: SequenceSplit) -> list[Tensor] | None:
        """Response tokens evenly spaced over all trajectories, by trajectory; the same at every run and any split."""
        lengths = [len(t.rollout.response) for t in trajectories]
        total = sum(lengths)
        count = min(self._diagnosed_tokens, total)
        if not self._diagnosed_tokens:
            return None
        chosen = torch.zeros(total, dtype=torch.bool)
        if count:
            chosen[torch.arange(count) * total // count] = True
        parts = zip(trajectories, chosen.split(lengths), strict=True)
        return [part[split.owned(t.rollout.response)].nonzero().squeeze(1) for t, part in parts]
