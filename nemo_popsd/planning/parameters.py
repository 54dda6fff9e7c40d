"""The number of parameters of one rank, by type, as Megatron allocates them: with vocabulary padding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE, LoRAConfig
from nemo_popsd.planning.layout import Layout
from nemo_popsd.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Linear:
    """One of the four linears of a layer (in a mixture of experts, of an expert)."""

    name: str
    """Megatron's name."""
    inputs: int
    """Columns of the matrix."""
    outputs: int
    """Rows of the matrix."""
    splits_outputs: bool
    """Whether tensor parallelism splits the rows (column-parallel) or the columns (row-parallel)."""
    bias: bool = False
    """Whether the linear has a bias."""
    expert: bool = False
    """Whether each expert has its own."""

    @property
    def weights(self) -> int:
        """Elements of the full matrix."""
        return self.inputs * self.outputs

    def share(self, tensor: int) -> int:
        """Elements of one rank's part, bias included."""
        bias = (self.outputs // tensor if self.splits_outputs else self.outputs) if self.bias else 0
        return self.weights // tensor + bias

    def adapter(self, rank: int) -> int:
        """Elements of both adapter matrices; tensor parallelism splits both."""
        return rank * (self.inputs + self.outputs)


def linears(sizes: ModelSizes) -> tuple[Linear, ...]:
    """The linears of a layer."""
    width, expert = sizes.query_width, sizes.experts > 0
    joined = width + 2 * sizes.key_width
    return (
        Linear("linear_qkv", sizes.hidden, joined, splits_outputs=True, bias=sizes.qkv_bias),
        Linear("linear_proj", width, sizes.hidden, splits_outputs=False, bias=sizes.output_bias),
        Linear("linear_fc1", sizes.hidden, 2 * sizes.intermediate, splits_outputs=True, expert=expert),
        Linear("linear_fc2", sizes.intermediate, sizes.hidden, splits_outputs=False, expert=expert),
    )


def padded_vocabulary(sizes: ModelSizes, layout: Layout) -> int:
    """V_p, padded vocabulary size over all ranks."""
    multiple = VOCABULARY_MULTIPLE * layout.tensor
    return math.ceil(sizes.vocab / multiple) * multiple


@dataclass(frozen=True)
class Stage:
    """A pipeline stage."""

    layers: int
    """Number of layers: L/p, unless `parallel.first_stage_layers` or `parallel.last_stage_layers` is set."""
    first: bool
    """Whether the stage has the embedding."""
    last: bool
    """Whether the stage has the last norm, the output matrix and the loss."""


def stage_of(sizes: ModelSizes, layout: Layout, rank: int) -> Stage:
    """The stage of a rank."""
    index = layout.stage_of(rank)
    return Stage(layout.stage_layers(sizes.layers)[index], first=index == 0, last=index == layout.pipeline - 1)


def stages(sizes: ModelSizes, layout: Layout) -> tuple[Stage, ...]:
    """The stages that can have the most parameters or activations: the first, an inner one if it has more layers than
    the first, and the last; or the only stage.
    """
    layers = layout.stage_layers(sizes.layers)
    if layout.pipeline == 1:
        return (Stage(layers[0], first=True, last=True),)
    between = [Stage(layers[1], first=False, last=False)] if layers[1:-1] and layers[1] > layers[0] else []
    return (Stage(layers[0], first=True, last=False), *between, Stage(layers[-1], first=False, last=True))


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements on one rank."""

    dense: int
    """Elements of the model outside experts."""
    experts: int
    """Elements of the model in experts."""
    adapters: int
    """Elements of adapters outside experts."""
    expert_adapters: int
    """Elements of adapters in experts."""
    vocabulary: int
    """Elements of one vocabulary matrix, part of `dense`."""

    @property
    def model(self) -> int:
        """Elements without adapters."""
        return self.dense + self.experts

    @property
    def all(self) -> int:
        """Elements including adapters."""
        return self.model + self.adapters + self.expert_adapters


def count(sizes: ModelSizes, layout: Layout, stage: Stage, lora: LoRAConfig | None) -> Parameters:
    """Elements on one rank of `stage`, including adapters if `lora` is given."""
    hidden = sizes.hidden
    vocabulary = padded_vocabulary(sizes, layout) // layout.tensor * hidden
    norms = _norms(sizes, layout.tensor)
    router = hidden * sizes.experts
    local_experts = sizes.experts // layout.expert
    dense = stage.layers * (norms + router) + (hidden if stage.last else 0)
    # A tied output matrix is the embedding if both are on one stage, otherwise a copy of it.
    dense += vocabulary * (int(stage.first) + int(stage.last and not (sizes.tied and stage.first)))
    experts = adapters = expert_adapters = 0
    for linear in linears(sizes):
        adapted = lora is not None and linear.name in lora.targets
        adapter = linear.adapter(lora.rank) if lora is not None and adapted else 0
        if linear.expert:
            experts += stage.layers * local_experts * linear.share(layout.expert_shards)
            expert_adapters += stage.layers * local_experts * (adapter // layout.expert_shards)
        else:
            dense += stage.layers * linear.share(layout.tensor)
            adapters += stage.layers * (adapter // layout.tensor)
    return Parameters(dense, experts, adapters, expert_adapters, vocabulary)


def _norms(sizes: ModelSizes, tensor: int) -> int:
    """Weights of the norms of one layer on a rank."""
    if sizes.joint_qk_norm:
        return 2 * sizes.hidden + (sizes.query_width + sizes.key_width) // tensor
    return 2 * sizes.hidden + (2 * sizes.head_dim if sizes.qk_norm else 0)


def total_parameters(sizes: ModelSizes) -> int:
    """Parameters of the full published model, without padding and adapters."""
    return published_parameters(sizes, Stage(sizes.layers, first=True, last=True))


def published_parameters(sizes: ModelSizes, stage: Stage) -> int:
    """Parameters of a stage of the published model. A tied output matrix is counted once, on the first stage."""
    hidden, experts = sizes.hidden, max(1, sizes.experts)
    vocabulary = sizes.vocab * hidden * (int(stage.first) + int(stage.last and not sizes.tied))
    inside = sum(linear.share(1) * (experts if linear.expert else 1) for linear in linears(sizes))
    layer = _norms(sizes, 1) + hidden * sizes.experts + inside
    return vocabulary + (hidden if stage.last else 0) + stage.layers * layer
