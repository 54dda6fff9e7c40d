"""What the package uses of Megatron-Bridge's model provider and of megatron-core's optimizers.

Neither library is typed. These protocols state the attributes and methods that the package depends on, so that a type
checker sees a misspelt one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypedDict

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec


class ModelProvider(Protocol):
    """Megatron-Bridge's ``GPTModelProvider``: an architecture (a ``TransformerConfig``) that builds its model."""

    # The architecture.
    num_layers: int
    num_attention_heads: int
    num_query_groups: int | None
    num_moe_experts: int | None
    window_size: tuple[int, int] | None
    normalization: str
    qk_layernorm: bool
    position_embedding_type: str
    rotary_interleaved: bool
    gated_linear_unit: bool
    glu_linear_offset: float
    activation_func: Callable[..., torch.Tensor]
    use_te_activation_func: bool
    # The layout.
    tensor_model_parallel_size: int
    sequence_parallel: bool
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int | None
    variable_seq_lengths: bool
    batch_p2p_comm: bool
    overlap_p2p_comm: bool
    deallocate_pipeline_outputs: bool
    num_layers_in_first_pipeline_stage: int | None
    num_layers_in_last_pipeline_stage: int | None
    parallel_output: bool
    should_pad_vocab: bool
    make_vocab_size_divisible_by: int
    _pg_collection: ProcessGroupCollection
    # Precision and initial values.
    bf16: bool
    fp16: bool
    params_dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    pipeline_dtype: torch.dtype | None
    perform_initialization: bool
    # Training.
    hidden_dropout: float
    attention_dropout: float
    moe_token_dispatcher_type: str
    moe_router_load_balancing_type: str
    moe_aux_loss_coeff: float
    moe_grouped_gemm: bool
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    recompute_modules: list[str] | None
    gradient_accumulation_fusion: bool
    # Layers.
    transformer_layer_spec: ModuleSpec | Callable[..., ModuleSpec]
    bias_dropout_fusion: bool
    bias_activation_fusion: bool
    apply_rope_fusion: bool

    def finalize(self) -> None:
        """Checks the fields and derives the others; called once, after the last change."""

    def provide(self, *, vp_stage: int | None = None) -> GPTModel:
        """The model of this rank, or its chunk `vp_stage`."""


class LinearModule(Protocol):
    """A linear of megatron-core, with LoRA or without, of which each rank has a shard."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tp_group: dist.ProcessGroup
    gather_output: bool
    """Of a column-parallel linear."""
    input_is_parallel: bool
    """Of a row-parallel linear."""

    def __call__(self, x: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the bias where the caller adds it."""


class ShardedParameter(Protocol):
    """A parameter of which each tensor-parallel rank has a shard, marked by megatron-core."""

    partition_dim: int
    shape: torch.Size

    def copy_(self, other: torch.Tensor, /) -> object:
        """Sets the values."""


class ParameterGroup(TypedDict):
    """What the package reads of a group of Adam's parameters."""

    lr: float


class MegatronOptimizer(Protocol):
    """megatron-core's optimizer as `megatron.core.optimizer.get_megatron_optimizer` returns it, chained or not."""

    @property
    def param_groups(self) -> list[ParameterGroup]:
        """Of Adam."""

    def prepare_grads(self) -> bool:
        """Copies gradients to the main weights; whether any of them is Inf or NaN under loss scaling."""

    def get_grad_norm(self) -> float:
        """Global norm of the gradients, the same on every rank."""

    def step(self) -> object:
        """Clips and updates."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients."""

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale."""


class OptimizerPart(Protocol):
    """One member of a chained optimizer, or an optimizer that is not chained."""

    optimizer: torch.optim.Optimizer
    """Adam."""
    config: OptimizerConfig
    init_state_fn: Callable[[torch.optim.Optimizer, OptimizerConfig], None]
    """Creates Adam's state where it is missing."""


class ChainedOptimizer(Protocol):
    """megatron-core's optimizer of several parts."""

    chained_optimizers: Sequence[OptimizerPart]


AnyOptimizer: TypeAlias = MegatronOptimizer | ChainedOptimizer | OptimizerPart
