"""Settings of the parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of

RING, GATHERED, HEADS, HIERARCHICAL = "p2p", "all_gather", "a2a", "a2a+p2p"
"""Values of `parallel.context_type`."""
_SIZE = Bounds(1, 2**16)
_SIZE_OR_ZERO = Bounds(1, 2**16, or_zero=True)


class Stages(Protocol):
    """Division of layers over pipeline stages."""

    @property
    def pipeline(self) -> int:
        """Number of stages."""

    @property
    def virtual_pipeline(self) -> int:
        """Number of model chunks per stage."""

    @property
    def first_stage_layers(self) -> int:
        """Number of layers of the first stage; 0 uses the number of the other stages."""

    @property
    def last_stage_layers(self) -> int:
        """Number of layers of the last stage; 0 uses the number of the other stages."""


def layers_by_stage(stages: Stages, layers: int) -> tuple[int, ...] | None:
    """Return the number of layers of each pipeline stage, as megatron-core divides `layers`; None if not divisible.

    Source: `megatron.core.transformer.transformer_block.get_num_layers_to_build`.
    """
    first, last = stages.first_stage_layers, stages.last_stage_layers
    even = stages.pipeline - bool(first) - bool(last)
    rest = layers - first - last
    if rest < even or (rest % even if even else rest):
        return None
    each = [first or rest // even, *[rest // even if even else 0] * (stages.pipeline - 2), last or rest // even]
    result = tuple(each) if stages.pipeline > 1 else (layers,)
    return None if any(size % stages.virtual_pipeline for size in result) else result


@dataclass(kw_only=True)
class ParallelConfig:
    """Distribution of the model over ranks. The remaining factor of the world size is data parallelism."""

    tensor: Annotated[int, _SIZE] = 1
    """Tensor-parallel size: matrices and vocabulary are sharded."""
    sequence: str = "auto"
    """Whether norms and residuals are split along the sequence over the tensor-parallel ranks: `true` (needs `tensor`
    above 1), `false`, or `auto` (on with `tensor` above 1). Sequence parallelism saves memory and sends the same number
    of bytes."""
    pipeline: Annotated[int, _SIZE] = 1
    """Pipeline-parallel size: the number of stages over which layers are divided."""
    virtual_pipeline: Annotated[int, _SIZE] = 1
    """Model chunks per stage, for the interleaved schedule. Values above 1 need `pipeline` above 1."""
    first_stage_layers: Annotated[int, _SIZE_OR_ZERO] = 0
    """Layers of the first stage, which also has the embedding; 0 uses the number of the other stages, which divide the
    remaining layers evenly."""
    last_stage_layers: Annotated[int, _SIZE_OR_ZERO] = 0
    """Layers of the last stage, which also has the output matrix and the loss; 0 uses the number of the other
    stages."""
    overlap_transfers: bool = False
    """Overlap transfers between stages with the computation of the next micro-batch. Needs the interleaved schedule
    (`virtual_pipeline` above 1), which multiplies the number of transfers by `virtual_pipeline`."""
    context: Annotated[int, _SIZE] = 1
    """Context-parallel size: the number of ranks over which each sequence is split, for long contexts."""
    context_type: str = "auto"
    """How attention obtains the keys and values of other context-parallel ranks (Megatron's `cp_comm_type`): `p2p`, a
    ring that overlaps with compute; `all_gather`, all at once, with `training.packing=false`; `a2a`, each rank has all
    tokens of a share of the heads; `a2a+p2p`, heads within nodes and rings between them, with `context_sizes` and
    `training.packing=false`. `auto` is `p2p` on Transformer Engine's layers. Local layers support only `all_gather`,
    also with packing."""
    context_sizes: Annotated[list[int], _SIZE] = field(default_factory=list)
    """With `context_type=a2a+p2p`: the number of neighbouring context-parallel ranks that divide heads, and the number
    of ranks in a ring, as in [2, 4] for `context=8`."""
    expert: Annotated[int, _SIZE] = 1
    """Expert-parallel size: the number of ranks over which the experts of a mixture-of-experts model are
    distributed."""
    expert_tensor: Annotated[int, _SIZE_OR_ZERO] = 0
    """Number of ranks over which each expert's matrices are split (Megatron's `expert_tensor_model_parallel_size`), a
    divisor of `tensor`. 0 means 1 with `expert` above 1, otherwise `tensor`. `expert · expert_tensor` ranks share the
    experts; if this exceeds `tensor`, they belong to several data-parallel or context-parallel ranks."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel")
        one_of("parallel.sequence", self.sequence, ("auto", "true", "false"))
        if self.sequence == "true" and self.tensor == 1:
            raise UserError(
                "configuration",
                got="parallel.sequence=true with parallel.tensor=1",
                need="tensor-parallel ranks to split sequences over",
                fix="set parallel.tensor above 1, or parallel.sequence=auto",
            )
        self._check_context()
        self._check_experts()
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError(
                "configuration",
                got=f"parallel.virtual_pipeline={self.virtual_pipeline} with parallel.pipeline=1",
                need="pipeline stages to interleave",
                fix="set parallel.pipeline above 1, or parallel.virtual_pipeline=1",
            )
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) and self.pipeline == 1:
                raise UserError(
                    "configuration",
                    got=f"parallel.{name}={getattr(self, name)} with parallel.pipeline=1",
                    need="several pipeline stages",
                    fix=f"set parallel.pipeline above 1, or parallel.{name}=0",
                )
        if self.overlap_transfers and self.virtual_pipeline == 1:
            raise UserError(
                "configuration",
                got="parallel.overlap_transfers=true with parallel.virtual_pipeline=1",
                need="the interleaved schedule, the only one in which Megatron overlaps transfers",
                fix="set parallel.virtual_pipeline above 1, or parallel.overlap_transfers=false",
            )

    def _check_context(self) -> None:
        kinds = (RING, GATHERED, HEADS, HIERARCHICAL)
        one_of("parallel.context_type", self.context_type, ("auto", *kinds))
        if self.context_type != "auto" and self.context == 1:
            raise UserError(
                "configuration",
                got=f"parallel.context_type={self.context_type} with parallel.context=1",
                need="context-parallel ranks",
                fix="set parallel.context above 1, or parallel.context_type=auto",
            )
        hierarchical = self.context_type == HIERARCHICAL
        fits = len(self.context_sizes) == 2 and math.prod(self.context_sizes) == self.context
        if hierarchical != bool(self.context_sizes) or (hierarchical and not fits):
            raise UserError(
                "configuration",
                got=f"parallel.context_sizes={self.context_sizes} with parallel.context_type={self.context_type} and "
                f"parallel.context={self.context}",
                need=f"with {HIERARCHICAL} two sizes whose product is parallel.context, otherwise no sizes",
                fix="set parallel.context_sizes",
            )

    def _check_experts(self) -> None:
        if self.expert == 1 and self.expert_tensor not in (0, self.tensor):
            # `megatron.core.tensor_parallel.layers.ColumnParallelLinear`: `allreduce` of an expert's weight.
            raise UserError(
                "configuration",
                got=f"parallel.expert_tensor={self.expert_tensor} with parallel.tensor={self.tensor} and "
                "parallel.expert=1",
                need="expert parallelism: without it, megatron-core 0.16 does not sum the gradients of unsplit experts "
                "over the tensor-parallel ranks",
                fix="set parallel.expert above 1, or parallel.expert_tensor=0",
            )
        if self.tensor % self.expert_shards:
            raise UserError(
                "configuration",
                got=f"parallel.expert_tensor={self.expert_tensor} with parallel.tensor={self.tensor}",
                need="a divisor of parallel.tensor, because tensor-parallel ranks have the same sequences",
                fix="set parallel.expert_tensor",
            )

    @property
    def expert_shards(self) -> int:
        """Number of ranks over which an expert's matrices are split (resolved `expert_tensor`)."""
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @property
    def splits_sequences(self) -> bool:
        """Whether norms and residuals are split along the sequence (resolved `sequence`)."""
        return self.sequence == "true" or (self.sequence == "auto" and self.tensor > 1)

    @property
    def replica_ranks(self) -> int:
        """Number of ranks of one data-parallel replica: tensor · pipeline · context."""
        return self.tensor * self.pipeline * self.context

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension that has process groups."""
        return {name: getattr(self, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")}

    def describe(self) -> str:
        """Format sizes above 1, uneven stages and split experts as settings; ``parallel.tensor=1`` if all are 1."""
        shown = [name for name, size in self.sizes.items() if size > 1]
        shown += [name for name in ("first_stage_layers", "last_stage_layers", "expert_tensor") if getattr(self, name)]
        return " ".join(f"parallel.{name}={getattr(self, name)}" for name in shown) or "parallel.tensor=1"

    def check_world(self, ranks: int) -> None:
        """Refuse a number of ranks that the layout does not divide.

        Raises:
            UserError: the layout does not divide `ranks`; the message names the settings and the smallest valid number.
        """
        sharing = self.expert_shards * self.expert * self.pipeline
        fits = math.lcm(self.replica_ranks, sharing)
        for size, named in (
            (self.replica_ranks, "tensor · pipeline · context"),
            (sharing, "expert_tensor · expert · pipeline" if self.expert_shards > 1 else "expert · pipeline"),
        ):
            if ranks % size:
                raise UserError(
                    "layout",
                    got=f"{self.describe()} with {ranks} rank{'s' if ranks > 1 else ''}",
                    need=f"a number of ranks that {size} ({named}) divides",
                    fix=f"set parallel.*, or start a multiple of {fits} ranks (torchrun --nproc-per-node {fits})",
                )
