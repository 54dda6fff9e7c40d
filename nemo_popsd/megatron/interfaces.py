"""Protocols for Megatron-Bridge's model provider and for megatron-core's models and optimizers.

Neither library is typed. These protocols declare the attributes and methods that the package uses, so that a type
checker detects a misspelt one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, TypedDict

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock


class ModelProvider(Protocol):
    """Megatron-Bridge's ``GPTModelProvider``: an architecture (a ``TransformerConfig``) that builds its model."""

    # The architecture.
    num_layers: int
    num_attention_heads: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int | None
    num_query_groups: int | None
    num_moe_experts: int | None
    moe_ffn_hidden_size: int | None
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
    cp_comm_type: str | None
    hierarchical_context_parallel_sizes: list[int] | None
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
    fp8: str | None
    fp8_recipe: str
    tp_only_amax_red: bool
    first_last_layers_bf16: bool
    num_layers_at_start_in_bf16: int
    num_layers_at_end_in_bf16: int
    pipeline_dtype: torch.dtype | None
    perform_initialization: bool
    # Training.
    gradient_accumulation_fusion: bool
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
    # Layers.
    transformer_layer_spec: ModuleSpec | Callable[..., ModuleSpec]
    bias_dropout_fusion: bool
    bias_activation_fusion: bool
    apply_rope_fusion: bool

    def finalize(self) -> None:
        """Checks the fields and derives the others; called once, after the last change."""

    def provide(self, *, vp_stage: int | None = None) -> ModelChunk:
        """The model of this rank, or its chunk `vp_stage`."""


class ModelChunk(Protocol):
    """This rank's part of a language model: megatron-core's ``GPTModel``, complete or one stage of a pipeline.

    ``build_chunks`` creates chunks. A chunk is a ``torch.nn.Module``; only the members that the package uses are
    listed.
    """

    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    pre_process: bool
    """Whether the chunk has the embedding."""
    post_process: bool
    """Whether the chunk has the last norm and the output layer."""
    share_embeddings_and_output_weights: bool
    position_embedding_type: str
    embedding: torch.nn.Module
    """The embedding; only if `pre_process`."""
    rotary_pos_emb: RotaryEmbedding
    """The rotary embedding, if `position_embedding_type` is one."""
    decoder: TransformerBlock
    output_layer: OutputLayer
    """The output layer; only if `post_process`."""
    vocab_size: int
    """Size of the vocabulary, padding included."""
    training: bool

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Sets the output of the previous stage, which the next forward continues."""

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The matrix that embedding and output layer of a tied model share."""

    def set_is_first_microbatch(self) -> None:
        """Lets Transformer Engine quantise the weights again in the next forward, if ``config.fp8`` is set."""

    def sharded_state_dict(self) -> dict[str, object]:
        """Tensors with their positions in the full model, for a distributed checkpoint."""

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Hidden states, or logits of this rank's vocabulary shard if the chunk has an output layer."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of the chunk."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields pairs of name in the chunk and object."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """The chunk and all modules in it."""

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yields pairs of name in the chunk and object."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by name, without their positions in the full model."""

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True) -> tuple[list[str], list[str]]:
        """Sets the values; returns missing and unexpected names."""

    def train(self, mode: bool = True) -> Self:
        """Selects training or evaluation mode."""

    def eval(self) -> Self:
        """Selects evaluation mode."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets whether the parameters have gradients."""

    def to(self, device: torch.device) -> Self:
        """Moves the parameters."""


class OutputLayer(Protocol):
    """The linear from hidden states to logits, sharded over the tensor-parallel ranks."""

    weight: torch.Tensor

    def __call__(
        self, x: torch.Tensor, /, *, weight: torch.Tensor | None, runtime_gather_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of this rank's vocabulary shard, computed with its own weight or with `weight`, and the bias."""


class BucketGroup(Protocol):
    """Buckets of parameters whose weights are gathered together."""

    def finish_param_sync(self) -> None:
        """Waits for the gathered weights."""


class WrappedChunk(Protocol):
    """A chunk in megatron-core's ``DistributedDataParallel``, which accumulates and reduces its gradients."""

    module: ModelChunk
    ddp_config: DistributedDataParallelConfig
    use_forward_hook: bool
    """Whether forward pre-hooks of the modules wait for the gathered weights."""
    remove_forward_pre_hook_handles: Mapping[torch.nn.Module, object]
    """Empty while these hooks are disabled."""
    param_to_bucket_group: Mapping[torch.Tensor, BucketGroup]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which gradients are accumulated but not reduced."""

    def zero_grad_buffer(self) -> None:
        """Clears the accumulated gradients."""

    def enable_forward_pre_hook(self) -> None:
        """Lets the next forward pass gather the updated weights."""

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Removes the hooks; gathers the weights unless `param_sync` is false."""

    def start_param_sync(self, *, force_sync: bool = False) -> None:
        """Gathers the updated weights, one all-gather for each bucket; waits for them if `force_sync`."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of the chunk."""

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The output of the chunk."""


class LinearModule(Protocol):
    """A sharded linear of megatron-core, with or without LoRA."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tp_group: dist.ProcessGroup
    gather_output: bool
    """Attribute of a column-parallel linear."""
    input_is_parallel: bool
    """Attribute of a row-parallel linear."""

    def __call__(self, x: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the bias if the caller has to add it."""


class ShardedParameter(Protocol):
    """A parameter sharded over the tensor-parallel ranks, with the attributes that megatron-core sets."""

    partition_dim: int
    shape: torch.Size

    def copy_(self, other: torch.Tensor, /) -> object:
        """Sets the values."""


class ParameterGroup(TypedDict):
    """Entries of an Adam parameter group that the package reads."""

    lr: float


class MegatronOptimizer(Protocol):
    """megatron-core's optimizer as `megatron.core.optimizer.get_megatron_optimizer` returns it, chained or not."""

    @property
    def param_groups(self) -> list[ParameterGroup]:
        """Adam's parameter groups."""

    def prepare_grads(self) -> bool:
        """Copies gradients to the main weights; returns whether any is Inf or NaN under loss scaling."""

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
    """Creates missing Adam state."""


class ChainedOptimizer(Protocol):
    """megatron-core's optimizer of several parts."""

    chained_optimizers: Sequence[OptimizerPart]


AnyOptimizer: TypeAlias = MegatronOptimizer | ChainedOptimizer | OptimizerPart
