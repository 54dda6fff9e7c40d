"""Settings of the layout over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, check_numbers

_SIZE = Bounds(1, 2**16)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is distributed over ranks. The remaining factor of the world size is data parallelism."""

    tensor: Annotated[int, _SIZE] = 1
    """Tensor-parallel size: matrices and vocabulary are sharded."""
    sequence: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks; needs `tensor` above 1."""
    pipeline: Annotated[int, _SIZE] = 1
    """Pipeline-parallel size: layers are split into this number of stages."""
    virtual_pipeline: Annotated[int, _SIZE] = 1
    """Model chunks of each stage, for the interleaved schedule; above 1 it needs `pipeline` above 1."""
    context: Annotated[int, _SIZE] = 1
    """Context-parallel size: each sequence is split, for long contexts."""
    expert: Annotated[int, _SIZE] = 1
    """Expert-parallel size: the experts of a mixture-of-experts model are distributed, each complete on one rank."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel")
        if self.sequence and self.tensor == 1:
            raise UserError(
                "configuration",
                got="parallel.sequence=true with parallel.tensor=1",
                need="tensor-parallel ranks to split sequences over",
                fix="set parallel.tensor above 1, or parallel.sequence=false",
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError(
                "configuration",
                got=f"parallel.virtual_pipeline={self.virtual_pipeline} with parallel.pipeline=1",
                need="pipeline stages to interleave",
                fix="set parallel.pipeline above 1, or parallel.virtual_pipeline=1",
            )

    @property
    def replica_ranks(self) -> int:
        """Ranks of one data-parallel replica: tensor · pipeline · context."""
        return self.tensor * self.pipeline * self.context

    def describe(self) -> str:
        """The sizes above 1 as settings, or ``parallel.tensor=1`` if all are 1."""
        names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
        return " ".join(f"parallel.{n}={getattr(self, n)}" for n in names if getattr(self, n) > 1) or (
            "parallel.tensor=1"
        )

    def check_world(self, ranks: int) -> None:
        """Refuses a number of ranks that the layout does not divide.

        Raises:
            UserError: the message names the settings and the smallest number of ranks that fits.
        """
        fits = math.lcm(self.replica_ranks, self.expert * self.pipeline)
        for size, named in (
            (self.replica_ranks, "tensor · pipeline · context"),
            (self.expert * self.pipeline, "expert · pipeline"),
        ):
            if ranks % size:
                raise UserError(
                    "layout",
                    got=f"{self.describe()} with {ranks} rank{'s' if ranks > 1 else ''}",
                    need=f"a number of ranks that {size} ({named}) divides",
                    fix=f"set parallel.*, or start a multiple of {fits} ranks (torchrun --nproc-per-node {fits})",
                )
