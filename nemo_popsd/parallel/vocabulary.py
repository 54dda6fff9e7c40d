"""The vocabulary entries of the output matrix and of the logits on each rank, and which of them are padding.

The vocabulary is padded at its end to ranks · width; rank r holds the contiguous range [r·width, (r+1)·width). A rank's
true entries are therefore a prefix of its shard. The losses use only this prefix: padding has probability exactly 0, is
not part of any mean, and gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.parallel.collectives import group_rank, group_size, reduce_sum_


@dataclass(frozen=True)
class VocabShard:
    """This rank's shard of the vocabulary. No property needs a collective.

    Raises:
        UserError: `vocab_size` is not positive or exceeds the total size of the shards.
    """

    vocab_size: int
    """Size of the true vocabulary over all shards."""
    width: int
    """Rows of the output matrix (columns of the logits) on each rank, padding included: V_pad/tp."""
    group: dist.ProcessGroup | None = None
    """The group over which the vocabulary is sharded; None for one shard."""

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= self.width * self.ranks:
            raise UserError(
                "vocabulary",
                got=f"vocab_size={self.vocab_size} with an output matrix of {self.ranks} x {self.width} rows",
                need=f"1 to {self.width * self.ranks} entries",
                fix="pass the size of the tokenizer's vocabulary for which the model was built",
            )

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return group_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this rank's shard."""
        return group_rank(self.group)

    @property
    def offset(self) -> int:
        """Vocabulary id of this rank's first entry."""
        return self.rank * self.width

    @property
    def true_width(self) -> int:
        """Number of true vocabulary entries on this rank: a prefix of its shard, possibly empty."""
        return self.true_widths[self.rank]

    @property
    def true_widths(self) -> list[int]:
        """`true_width` of every rank of the group, by rank."""
        return [min(max(self.vocab_size - rank * self.width, 0), self.width) for rank in range(self.ranks)]

    @property
    def ids(self) -> range:
        """Vocabulary ids of this rank's true entries."""
        return range(self.offset, self.offset + self.true_width)


def token_max(x: Tensor) -> Tensor:
    """Maximum over the last dimension; −∞ if it is empty (a shard that contains only padding)."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf)
    return x.amax(-1)


def mean_output_vector(weight: Tensor, shard: VocabShard) -> Tensor:
    """The mean output vector w̄ over the true vocabulary, so that mean_v(W·d) = w̄·d (*ours*; see eq. 14).

    One all-reduce of [H]. A frozen matrix needs it once per run.

    Args:
        weight: this rank's shard of the output matrix [V_pad/tp, H].
        shard: the vocabulary entries of `weight`.

    Returns:
        [H], replicated, in fp32 (float64 for float64).
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.detach()[: shard.true_width].sum(0, dtype=dtype)
    return reduce_sum_(total, shard.group).div_(shard.vocab_size)
