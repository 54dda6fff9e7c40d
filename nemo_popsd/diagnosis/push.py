r"""The vocabulary entries that each component of the signal promotes and suppresses, summed over tokens (*ours*).

To first order, a step along a component Δ_c changes the student's probabilities by

    push_c(v) = Σ_t π_θ(v|t) · (Δ_c(v, t) − E_{π_θ(·|t)} Δ_c(·, t))

for c = total (log π_T − log π_θ), reference (log π_ref − log π_θ), question (log π_T − log π_ref) and target
(log P − log π_θ). Each sums to 0 over the vocabulary, and push_total = push_reference + push_question.
Entries with probability 0 under the student have push 0 for any Δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.diagnosis.shards import largest_of_shards
from nemo_popsd.parallel.collectives import reduce_sum_
from nemo_popsd.parallel.vocabulary import VocabShard

COMPONENTS = ("total", "reference", "question", "target")
"""Components in the order of `VocabularyPush.push`."""


@dataclass(frozen=True)
class PushedTokens:
    """The push of every component on n vocabulary entries, replicated."""

    ids: Tensor
    """Vocabulary ids [n], int64."""
    push: Tensor
    """First-order change of expected occurrences in all tokens [4, n], float64, in the order of `COMPONENTS`."""
    mass: Tensor
    """Expected occurrences under the student [n], float64: Σ_t π_θ(v|t)."""


class VocabularyPush:
    """Running sums over tokens for this rank's vocabulary entries.

    Attributes:
        push: sums of push [4, v], float64, in the order of `COMPONENTS`.
        mass: sums of mass [v], float64.
        tokens: number of tokens added so far.
    """

    def __init__(self, shard: VocabShard, device: torch.device) -> None:
        """Initializes all sums to 0, for the true entries of `shard`, on `device`."""
        self._shard = shard
        self.push = torch.zeros(len(COMPONENTS), shard.true_width, dtype=torch.float64, device=device)
        self.mass = torch.zeros(shard.true_width, dtype=torch.float64, device=device)
        self.tokens = 0

    def reduce_over_(self, dp_group: dist.ProcessGroup | None) -> None:
        """Replaces the sums by those over all data-parallel ranks. One all-reduce of [5·v + 1] in float64."""
        packed = torch.cat([self.push.flatten(), self.mass, self.mass.new_tensor([self.tokens])])
        reduce_sum_(packed, dp_group)
        self.push.copy_(packed[: self.push.numel()].view_as(self.push))
        self.mass.copy_(packed[self.push.numel() : -1])
        self.tokens = int(packed[-1].item())

    def extremes(self, count: int) -> tuple[list[PushedTokens], list[PushedTokens]]:
        """The `count` most promoted and most suppressed entries of each component, strongest first.

        Collectives over the vocabulary group: one all-gather of [2, 4, count] pairs and one all-reduce of [5, 8·count].
        `count` is at most the vocabulary size.
        """
        signed_push = (self.push, -self.push)
        ids = largest_of_shards(signed_push, count, self._shard).ids
        pushed = self.look_up(ids.flatten())
        parts = [
            PushedTokens(pushed.ids[part], pushed.push[:, part], pushed.mass[part])
            for part in torch.arange(len(pushed.ids), device=pushed.ids.device).split(count)
        ]
        return parts[: len(COMPONENTS)], parts[len(COMPONENTS) :]

    def look_up(self, ids: Tensor) -> PushedTokens:
        """The sums of the vocabulary entries `ids` [n], on every rank of the vocabulary group.

        One all-reduce of [5, n].
        """
        local = ids - self._shard.offset
        is_local = ((local >= 0) & (local < self._shard.true_width)).nonzero().squeeze(1)
        sums = self.mass.new_zeros(len(COMPONENTS) + 1, len(ids))
        sums[:-1, is_local] = self.push[:, local[is_local]]
        sums[-1, is_local] = self.mass[local[is_local]]
        reduce_sum_(sums, self._shard.group)
        return PushedTokens(ids, sums[:-1], sums[-1])
