"""The frozen branches: hidden states of base, privileged teacher and reference-only teacher at each response token.

The branches apply the same weights θ₀ to different contexts, so the contexts of all rollouts are batched into as few
forwards as the token budget allows. Hidden states are kept, never logits. They are kept only on the last pipeline
stage, and with context parallelism only for the tokens that this rank owns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_popsd.distillation import DiagnosedTokens, HiddenPair, Target, hidden_pair
from nemo_popsd.megatron.base import FrozenBase
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.fp8 import in_fp8
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.microbatches import ContextSequence, TokenCount
from nemo_popsd.megatron.prefix.forward import shared_hidden_states, why_not_shared
from nemo_popsd.megatron.response_routing import SequenceSplit
from nemo_popsd.training.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetStates:
    """The inputs of the target distribution at the R response tokens of a trajectory that this rank owns."""

    vectors: HiddenPair
    """Vectors of the target, [R, H] each."""
    diagnosed: DiagnosedTokens | None
    """Tokens sampled for diagnosis."""

    def on_host(self) -> TargetStates:
        """A copy in host memory, pinned if there is a GPU."""
        tokens = self.diagnosed
        if tokens is not None:
            tokens = replace(tokens, privileged=_to_host(tokens.privileged), reference=_to_host(tokens.reference))
        anchor, shift = (None if vector is None else _to_host(vector) for vector in self.vectors)
        return TargetStates(HiddenPair(anchor, shift), tokens)


def _to_host(states: Tensor) -> Tensor:
    if not states.is_cuda:
        return states
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)


class FrozenBranches:
    """Runs the branches that a target needs.

    Attributes:
        computed: tokens that the frozen model processed in the last call, over all ranks that shared them.
    """

    def __init__(
        self,
        anchor: FrozenBase,
        teacher: FrozenBase,
        target: Target,
        *,
        token_budget: int,
        diagnosed_tokens: int,
        packed: bool = False,
        shared_cache_tokens: int | None = None,
        on_host: bool = False,
        fp8: FP8Config | None = None,
    ) -> None:
        """Stores references only.

        Args:
            anchor: weights of the base branch.
            teacher: weights of both teachers. If it is the same object as `anchor`, all branches share their forwards.
            target: the target; branches whose coefficient is 0 are skipped.
            token_budget: tokens of one forward, including padding.
            diagnosed_tokens: response tokens per call to keep for the diagnosis, which needs both teachers.
            packed: concatenate sequences instead of padding them.
            shared_cache_tokens: compute each distinct prefix once, and keep the keys and values of at most this many
                positions between forwards; None computes each sequence separately.
            on_host: keep the states in host memory until the loss needs them.
            fp8: whether (`frozen`) and how the linear layers compute in FP8.
        """
        self._weights = {"base": anchor, "privileged": teacher, "reference": teacher}
        self._target = target
        self._token_budget = token_budget
        self._diagnosed_tokens = diagnosed_tokens
        self._packed = packed
        self._shared_cache_tokens = shared_cache_tokens
        self._on_host = on_host
        self._fp8 = fp8 or FP8Config()
        self.computed = TokenCount()

    def target_states(self, trajectories: Sequence[Trajectory]) -> list[TargetStates]:
        """Target states of each trajectory, detached; an empty list except on the last pipeline stage.

        Collectives: those of Megatron's forwards and of `gather_response_states`.
        """
        names = self._target.frozen_branches(diagnosed=self._diagnosed_tokens > 0)
        contexts = {
            "base": [t.student for t in trajectories],
            "privileged": [t.privileged for t in trajectories],
            "reference": [t.reference for t in trajectories],
        }
        hidden: list[Tensor] = []
        split, self.computed = None, TokenCount()
        for weights in dict.fromkeys(self._weights[name] for name in names):  # in the order of `names`
            own = [name for name in names if self._weights[name] is weights]
            sequences = [sequence for name in own for sequence in contexts[name]]
            with weights.model() as chunks, in_fp8(chunks, self._fp8, "frozen"):
                states_of_own, computed = self._hidden_states(chunks, sequences)
                split = SequenceSplit.of(chunks[0])
            hidden += states_of_own
            self.computed += computed
        if not hidden:
            return []
        count = len(trajectories)
        branches = {name: hidden[i * count : (i + 1) * count] for i, name in enumerate(names)}
        assert split is not None
        diagnosed = self._sample(trajectories, split)
        states = []
        for i in range(count):
            branch_states = {name: by_trajectory[i] for name, by_trajectory in branches.items()}
            tokens = None
            if diagnosed is not None:
                privileged, reference = branch_states["privileged"], branch_states["reference"]
                index = diagnosed[i].to(privileged.device)
                tokens = DiagnosedTokens(index, privileged[index], reference[index])
            states.append(TargetStates(hidden_pair(self._target, **branch_states), tokens))
        return [state.on_host() for state in states] if self._on_host else states

    def _hidden_states(
        self, chunks: Sequence[ModelChunk], sequences: Sequence[ContextSequence]
    ) -> tuple[list[Tensor], TokenCount]:
        """Hidden states of each sequence, and the number of tokens computed for them."""
        if self._shared_cache_tokens is not None:
            reason = why_not_shared(chunks)
            if reason is None:
                return shared_hidden_states(chunks, sequences, self._token_budget, self._shared_cache_tokens)
            logger.warning("training.share_prefixes: each sequence is computed separately because of %s", reason)
            self._shared_cache_tokens = None
        batches = student_batches(chunks, sequences, self._token_budget, packed=self._packed)
        return frozen_hidden_states(chunks, batches), TokenCount.of(batches)

    def _sample(self, trajectories: Sequence[Trajectory], split: SequenceSplit) -> list[Tensor] | None:
        """Indices of evenly spaced response tokens, by trajectory; the same for any split of the sequences."""
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
