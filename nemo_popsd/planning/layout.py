"""A layout on a number of GPUs: its groups, the links that they use, and reasons why it is impossible."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from nemo_popsd.parallel.config import HEADS, HIERARCHICAL, ParallelConfig, layers_by_stage
from nemo_popsd.planning.sizes import ModelSizes

DIMENSIONS = tuple(item.name for item in fields(ParallelConfig))
"""Names of the settings in `parallel`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions. Ranks are numbered in Megatron's order: tensor, context, data, pipeline."""

    nodes: int
    """Number of nodes."""
    gpus_per_node: int
    """GPUs per node."""
    tensor: int = 1
    """t, tensor-parallel size."""
    sequence: bool = False
    """Whether norms and residuals are split along the sequence over the tensor-parallel ranks."""
    pipeline: int = 1
    """p, pipeline stages."""
    virtual_pipeline: int = 1
    """v, model chunks per stage."""
    first_stage_layers: int = 0
    """Layers of the first stage; 0 means the same number as the others."""
    last_stage_layers: int = 0
    """Layers of the last stage; 0 means the same number as the others."""
    overlap_transfers: bool = False
    """Whether transfers between stages overlap with compute."""
    context: int = 1
    """c, context-parallel size."""
    context_type: str = "auto"
    """How attention obtains the keys and values of other ranks."""
    context_sizes: list[int] = field(default_factory=list)
    """For `a2a+p2p`: the numbers of ranks that divide the heads and that form a ring."""
    expert: int = 1
    """e, expert-parallel size."""
    expert_tensor: int = 0
    """Value of `parallel.expert_tensor`; see `expert_shards`."""

    @staticmethod
    def of(parallel: ParallelConfig, *, nodes: int, gpus_per_node: int) -> Layout:
        """The layout that `parallel` describes on `nodes`."""
        settings = {name: getattr(parallel, name) for name in DIMENSIONS}
        return Layout(nodes=nodes, gpus_per_node=gpus_per_node, **{**settings, "sequence": parallel.splits_sequences})

    @property
    def world(self) -> int:
        """G, number of GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def replica(self) -> int:
        """t·p·c, GPUs that share the rows of one data-parallel rank."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """D = G / (t·p·c), data-parallel size."""
        return self.world // self.replica

    def stage_of(self, rank: int) -> int:
        """Index of the pipeline stage of a rank."""
        return rank // (self.world // self.pipeline)

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage; the layout must divide them (see `misfits`)."""
        each = layers_by_stage(self, layers)
        assert each is not None, (self, layers)
        return each

    @property
    def expert_shards(self) -> int:
        """t_e, ranks over which the matrices of the MLP (of an expert, in a mixture) are split."""
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @property
    def dense_replicas(self) -> int:
        """D·c, ranks that hold the same weights outside experts: gradients are reduced over them."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """G / (p·e·t_e), ranks that hold the same experts."""
        return self.world // (self.pipeline * self.expert * self.expert_shards)

    @property
    def sharing_replicas(self) -> int:
        """Number of replicas that share experts, and therefore decode each other's rows."""
        return max(1, self.expert * self.expert_shards // (self.tensor * self.context)) if self.expert > 1 else 1

    @property
    def context_heads(self) -> int:
        """Number of context-parallel ranks that divide the heads."""
        sizes = {HEADS: self.context, HIERARCHICAL: (self.context_sizes or [1])[0]}
        return sizes.get(self.context_type, 1)

    def spans_nodes(self, dimension: str) -> bool:
        """Whether a group of `dimension` (tensor, context, data, pipeline or expert) has ranks on several nodes."""
        reach = {
            "tensor": self.tensor,
            "context": self.tensor * self.context,
            "expert": self.expert_shards * self.expert,
            "data": self.tensor * self.context * self.data,
            "pipeline": self.world,
        }
        return reach[dimension] > self.gpus_per_node


def misfits(layout: Layout, sizes: ModelSizes, prompts: int) -> list[str]:
    """The reasons why `layout` is impossible, each with both numbers; empty if it is possible.

    Args:
        layout: a layout whose sizes are at least 1.
        sizes: the model.
        prompts: prompts per step over all data-parallel ranks.
    """
    reasons = []

    def divide(what: str, count: int, by: str, size: int) -> None:
        if count % size:
            reasons.append(f"{count} {what} do not divide by {by}={size}")

    divide("GPUs", layout.world, "tensor·pipeline·context", layout.replica)
    divide("GPUs", layout.world, "pipeline·expert", layout.pipeline * layout.expert)
    if layout.expert_tensor:
        shared = layout.pipeline * layout.expert * layout.expert_tensor
        divide("GPUs", layout.world, "pipeline·expert·expert_tensor", shared)
        divide("tensor-parallel ranks", layout.tensor, "parallel.expert_tensor", layout.expert_tensor)
        if layout.expert == 1 and layout.expert_tensor != layout.tensor:
            reasons.append(f"parallel.expert_tensor={layout.expert_tensor} needs parallel.expert above 1")
    divide("query heads", sizes.heads, "parallel.tensor", layout.tensor)
    divide("key-value heads", sizes.groups, "parallel.tensor", layout.tensor)
    if layout.context_heads > 1 and not reasons:
        divide("key-value heads of a rank", sizes.groups // layout.tensor, "its context ranks", layout.context_heads)
    setting = "parallel.expert_tensor" if layout.expert_tensor else "parallel.tensor"
    divide("MLP columns", sizes.intermediate, setting, layout.expert_shards)
    if not layout.first_stage_layers and not layout.last_stage_layers:
        divide("layers", sizes.layers, "pipeline·virtual_pipeline", layout.pipeline * layout.virtual_pipeline)
    elif layout.pipeline == 1 or layers_by_stage(layout, sizes.layers) is None:
        reasons.append(
            f"{sizes.layers} layers do not divide by parallel.pipeline={layout.pipeline} with "
            f"parallel.first_stage_layers={layout.first_stage_layers}, "
            f"parallel.last_stage_layers={layout.last_stage_layers} and "
            f"parallel.virtual_pipeline={layout.virtual_pipeline}"
        )
    if layout.tensor > layout.gpus_per_node:
        reasons.append(f"parallel.tensor={layout.tensor} reaches beyond a node of {layout.gpus_per_node} GPUs")
    if layout.expert > 1:
        if sizes.experts:
            divide("experts", sizes.experts, "parallel.expert", layout.expert)
        else:
            reasons.append(f"parallel.expert={layout.expert} with a model that has no experts")
    if sizes.experts and layout.tensor > 1 and not layout.sequence:
        reasons.append(f"experts with parallel.tensor={layout.tensor} need parallel.sequence=auto")
    if layout.sequence and layout.tensor == 1:
        reasons.append("parallel.sequence=true needs parallel.tensor above 1")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        reasons.append("parallel.virtual_pipeline needs parallel.pipeline above 1")
    if not reasons:
        divide("prompts of a step (training.prompts_per_step)", prompts, "data-parallel ranks", layout.data)
    return reasons
