"""Rows of each step as a function of (seed, step) only, so that a resumed run continues exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch.utils.data import Sampler

from nemo_popsd.errors import UserError

T = TypeVar("T")


class StepSampler(Sampler[list[int]]):
    """Infinite batch sampler: for each step, the row indices of this data-parallel rank.

    The orders of the epochs are concatenated, and step s (counted from 0) uses positions [s·B, (s+1)·B) of the result,
    with B = prompts_per_step: every row is visited once per epoch, and a step may extend into the next epoch. Rank r of
    D gets the r-th contiguous B/D of them, so the global batch is the same for any D.

    Every iterator starts at `start_step`, independent of earlier iterators and of loaders that prefetch: the only
    state is the number of completed steps, which the training loop keeps.
    """

    def __init__(
        self,
        rows: int,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
    ) -> None:
        """Set the order of the rows.

        Args:
            rows: size of the data set.
            prompts_per_step: rows of the global batch, over all data-parallel ranks.
            seed: determines the order of each epoch.
            shuffle: False visits the rows in file order in every epoch.
            dp_rank: this rank's index among the data-parallel ranks.
            dp_size: number of data-parallel ranks.
            start_step: number of completed steps.

        Raises:
            UserError: `prompts_per_step` is not a positive multiple of `dp_size`, or there are no rows.
        """
        if rows < 1:
            raise UserError("data", got="no rows", need="at least one", fix="set data.train.path")
        if prompts_per_step < 1 or prompts_per_step % dp_size:
            raise UserError(
                "batch",
                got=f"training.prompts_per_step={prompts_per_step} on {dp_size} data-parallel ranks",
                need=f"a positive multiple of {dp_size}",
                fix="set training.prompts_per_step, or the parallel sizes",
            )
        if not 0 <= dp_rank < dp_size or start_step < 0:
            raise ValueError(f"dp_rank={dp_rank} of dp_size={dp_size}, start_step={start_step}")
        self.rows = rows
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.start_step = start_step
        self._order: tuple[int, list[int]] | None = None

    def global_batch(self, step: int) -> list[int]:
        """Row indices of all ranks at `step`, in rank order."""
        batch: list[int] = []
        first = step * self.prompts_per_step
        while len(batch) < self.prompts_per_step:
            epoch, offset = divmod(first + len(batch), self.rows)
            batch += self._epoch_order(epoch)[offset : offset + self.prompts_per_step - len(batch)]
        return batch

    def local_batch(self, step: int) -> list[int]:
        """Row indices of this rank at `step`."""
        share = self.prompts_per_step // self.dp_size
        return self.global_batch(step)[self.dp_rank * share : (self.dp_rank + 1) * share]

    def epoch(self, step: int) -> int:
        """The epoch (counted from 0) of the first row of `step`."""
        return step * self.prompts_per_step // self.rows

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.local_batch(step)
            step += 1

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            order = list(range(self.rows))
            if self.shuffle:
                # Python hashes a string seed with SHA-512: the orders of two epochs or seeds are unrelated and do not
                # depend on the platform or on the state of another generator.
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def collate(rows: Sequence[T]) -> list[T]:
    """Return the rows as a list; the trainer pads or packs them."""
    return list(rows)
