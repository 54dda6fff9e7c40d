"""Which rows of the output matrix, or columns of the logits, are true vocabulary on this rank.

The vocabulary of size `vocab_size` is padded, at its end, to tp · width; rank r holds the contiguous range
[r·width, (r+1)·width). So a rank's true entries are a prefix of its shard: the losses cut to that prefix, and padding
has probability exactly 0, enters no mean and gets no gradient because it takes part in nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.parallel.collectives import group_rank, group_size, reduce_sum_


def true_width(width: int, vocab_size: int, tp_group: dist.ProcessGroup | None = None) -> int:
    """Number of true vocabulary entries among the `width` that this rank holds: a prefix, possibly empty.

    No collective.

    Raises:
        UserError: the shards together are smaller than the vocabulary.
    """
    shards = group_size(tp_group)
    if not 0 < vocab_size <= width * shards:
        raise UserError(
            "vocabulary",
            got=f"vocab_size={vocab_size} with an output matrix of {shards} x {width} rows",
            need=f"1 to {width * shards} entries",
            fix="give the size of the tokenizer's vocabulary that the model was built for",
        )
    return true_widths(width, vocab_size, tp_group)[group_rank(tp_group)]


def true_widths(width: int, vocab_size: int, tp_group: dist.ProcessGroup | None = None) -> list[int]:
    """As `true_width`, of every rank of the group, without its check."""
    return [min(max(vocab_size - rank * width, 0), width) for rank in range(group_size(tp_group))]


def row_max(x: Tensor) -> Tensor:
    """Maximum over the last dimension, −∞ where it is empty (a shard of nothing but padding)."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf)
    return x.amax(-1)


def mean_row(weight: Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean row w̄ of an output matrix over the true vocabulary, so that mean_v(W·d) = w̄·d (*ours*; see eq. 14).

    One all-reduce of [H]. Of a frozen matrix it is needed once per run.

    Args:
        weight: this rank's rows [V_pad/tp, H].
        vocab_size: size of the true vocabulary.
        tp_group: the group over which the rows are sharded; None for one shard.

    Returns:
        [H], replicated, in fp32 (float64 for float64).

    Raises:
        UserError: the shards together are smaller than the vocabulary.
    """
    valid = true_width(weight.shape[0], vocab_size, tp_group)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.detach()[:valid].sum(0, dtype=dtype)
    return reduce_sum_(total, tp_group).div_(vocab_size)
