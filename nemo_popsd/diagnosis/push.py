r"""Which vocabulary entries each component of the signal raises and lowers, summed over tokens (*ours*).

A step along a component Δ_c changes the student's probabilities, to first order, by

    push_c(v) = Σ_t π_θ(v|t) · (Δ_c(v, t) − E_{π_θ(·|t)} Δ_c(·, t))

for c = total (log π_T − log π_θ), reference (log π_ref − log π_θ), question (log π_T − log π_ref) and target
(log P − log π_θ). Each sums to 0 over the vocabulary: what is promoted is paid for by what is suppressed; and
push_total = push_reference + push_question. Entries that the student never considers weigh nothing, however large
their Δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.diagnosis.shards import largest_of_shards
from nemo_popsd.parallel.collectives import group_rank, reduce_sum_

COMPONENTS = ("total", "reference", "question", "target")
"""In the order of the rows of `VocabularyPush.push`."""


@dataclass(frozen=True)
class PushedTokens:
    """Some vocabulary entries with what every component does to them; n of them, replicated."""

    ids: Tensor
    """[n] int64."""
    push: Tensor
    """[4, n] float64, by `COMPONENTS`: expected occurrences gained (or lost) in all tokens, to first order."""
    mass: Tensor
    """[n] float64: expected occurrences under the student, Σ_t π_θ(v|t)."""


class VocabularyPush:
    """Running sums over tokens for this rank's vocabulary entries.

    Attributes:
        push: [4, v] float64, by `COMPONENTS`.
        mass: [v] float64.
        tokens: tokens seen so far.
    """

    def __init__(self, width: int, valid: int, device: torch.device) -> None:
        """All 0.

        Args:
            width: rows of the output matrix on this rank.
            valid: how many of them are true vocabulary.
            device: of the sums.
        """
        self._width = width
        self.push = torch.zeros(len(COMPONENTS), valid, dtype=torch.float64, device=device)
        self.mass = torch.zeros(valid, dtype=torch.float64, device=device)
        self.tokens = 0

    def reduce_over_(self, dp_group: dist.ProcessGroup | None) -> None:
        """Adds up the sums of all data-parallel ranks: one all-reduce of [5·v + 1] in float64."""
        packed = torch.cat([self.push.flatten(), self.mass, self.mass.new_tensor([self.tokens])])
        reduce_sum_(packed, dp_group)
        self.push.copy_(packed[: self.push.numel()].view_as(self.push))
        self.mass.copy_(packed[self.push.numel() : -1])
        self.tokens = int(packed[-1].item())

    def extremes(self, count: int, tp_group: dist.ProcessGroup | None) -> tuple[list[PushedTokens], list[PushedTokens]]:
        """The `count` most promoted and most suppressed entries of each component, strongest first.

        Collectives: one all-gather of [2, 4, count] pairs and one all-reduce of [5, 8·count]. `count` is at most the
        vocabulary.
        """
        both = (self.push, -self.push)
        ids = largest_of_shards(both, count, width=self._width, tp_group=tp_group).ids
        found = self.look_up(ids.flatten(), tp_group)
        parts = [
            PushedTokens(found.ids[at], found.push[:, at], found.mass[at])
            for at in torch.arange(len(found.ids), device=found.ids.device).split(count)
        ]
        return parts[: len(COMPONENTS)], parts[len(COMPONENTS) :]

    def look_up(self, ids: Tensor, tp_group: dist.ProcessGroup | None) -> PushedTokens:
        """The sums of vocabulary entries `ids` [n], on every rank. One all-reduce of [5, n]."""
        local = ids - group_rank(tp_group) * self._width
        mine = ((local >= 0) & (local < self.mass.shape[0])).nonzero().squeeze(1)
        found = self.mass.new_zeros(len(COMPONENTS) + 1, len(ids))
        found[:-1, mine] = self.push[:, local[mine]]
        found[-1, mine] = self.mass[local[mine]]
        reduce_sum_(found, tp_group)
        return PushedTokens(ids, found[:-1], found[-1])
