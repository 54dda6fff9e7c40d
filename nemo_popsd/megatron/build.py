"""Builds the model chunks of this rank from an architecture; no other module does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE, FP8Config, StudentConfig
from nemo_popsd.megatron.fp8 import refuse_fp8, set_fp8
from nemo_popsd.megatron.interfaces import ModelChunk, ModelProvider
from nemo_popsd.megatron.limits import refuse_impossible
from nemo_popsd.megatron.spec import choose_layer_spec
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import device


def build_chunks(
    provider: ModelProvider,
    student: StudentConfig,
    parallel: ParallelConfig,
    fields: Mapping[str, object] | None = None,
    fp8: FP8Config | None = None,
) -> list[ModelChunk]:
    """Builds this rank's part of the model on its device, with weights that are not yet loaded.

    Args:
        provider: a new provider with the architecture; changed in place.
        student: precision, adaptation and gradient checkpointing.
        parallel: the layout; Megatron's process groups must exist.
        fields: values of further fields of the provider (`megatron.model`).
        fp8: recipe of passes in FP8; the model computes in bf16 outside of `nemo_popsd.megatron.fp8.in_fp8`.

    Returns:
        The bare model chunks (no DDP, no adapters) in the order in which a token passes them: one, or
        `parallel.virtual_pipeline` of them. Parameters are fp32 or bf16. The vocabulary is padded to a multiple of 128
        times the tensor-parallel size.

    Raises:
        UserError: the layout does not divide the architecture, the layers cannot compute it in this layout, the
            requested layers are not installed, or FP8 is not possible.
    """
    refuse_impossible(provider, student, parallel)
    refuse_fp8(provider, student, parallel, fp8 or FP8Config())
    provider.tensor_model_parallel_size = parallel.tensor
    provider.sequence_parallel = parallel.splits_sequences
    provider.pipeline_model_parallel_size = parallel.pipeline
    provider.context_parallel_size = parallel.context
    provider.cp_comm_type = None if parallel.context_type == "auto" else parallel.context_type
    provider.hierarchical_context_parallel_sizes = parallel.context_sizes or None
    provider.expert_model_parallel_size = parallel.expert
    provider.expert_tensor_parallel_size = parallel.expert_shards
    # The only dispatcher that supports micro-batches of unequal lengths; not used without experts.
    provider.moe_token_dispatcher_type = "alltoall"
    # Experts are balanced in pre-training; here only the divergence is minimised.
    provider.moe_router_load_balancing_type = "none"
    provider.moe_aux_loss_coeff = 0.0
    provider.should_pad_vocab = True
    provider.make_vocab_size_divisible_by = VOCABULARY_MULTIPLE
    provider.parallel_output = True
    provider.perform_initialization = False
    provider.hidden_dropout = provider.attention_dropout = 0.0
    provider.fp16 = False
    provider.bf16 = student.precision == "bf16"
    provider.params_dtype = torch.bfloat16 if provider.bf16 else torch.float32
    provider.autocast_dtype = provider.params_dtype
    if parallel.pipeline > 1:
        _set_pipeline(provider, parallel)
    if student.recompute == "full":
        provider.recompute_granularity = "full"
        provider.recompute_method = student.recompute_method
        provider.recompute_num_layers = student.recompute_layers
    elif student.recompute == "selective":
        provider.recompute_granularity = "selective"
        provider.recompute_modules = list(student.recompute_modules)
    choose_layer_spec(provider, student.layers)
    if student.gradient_accumulation_fusion != "auto":
        provider.gradient_accumulation_fusion = student.gradient_accumulation_fusion == "true"
    set_fp8(provider, fp8 or FP8Config())
    for name, value in (fields or {}).items():
        setattr(provider, name, value)
    _finalize(provider, fields or {})
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    chunks = [provider.provide(vp_stage=stage) for stage in stages]
    for chunk in chunks:
        chunk.config.fp8 = None
        _mark_shards(chunk)
        chunk.to(device())
    return chunks


Model: TypeAlias = ModelChunk | Sequence[ModelChunk]
"""A model on this rank: its only chunk, or all of its chunks."""


def chunks_of(model: Model) -> list[ModelChunk]:
    """The chunks of `model`."""
    return list(model) if isinstance(model, Sequence) else [model]


def layout_of(model: ModelChunk) -> ParallelConfig:
    """The layout for which `model` was built."""
    config = model.config
    return ParallelConfig(
        tensor=config.tensor_model_parallel_size,
        sequence=str(config.sequence_parallel).lower(),
        pipeline=config.pipeline_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
        first_stage_layers=config.num_layers_in_first_pipeline_stage or 0,
        last_stage_layers=config.num_layers_in_last_pipeline_stage or 0,
        overlap_transfers=config.overlap_p2p_comm,
        context=config.context_parallel_size,
        context_type=config.cp_comm_type or "auto",
        context_sizes=config.hierarchical_context_parallel_sizes or [],
        expert=config.expert_model_parallel_size,
        expert_tensor=config.expert_tensor_parallel_size or 0 if config.expert_model_parallel_size > 1 else 0,
    )


def _finalize(provider: ModelProvider, fields: Mapping[str, object]) -> None:
    """Lets Megatron check its configuration; if Megatron refuses it, the error names the fields of the user.

    Raises:
        UserError: `fields` contradict each other or the rest.
    """
    try:
        provider.finalize()
    except (AssertionError, ValueError) as error:
        if not fields:
            raise
        raise UserError(
            "model",
            got=", ".join(f"megatron.model.{name}={value}" for name, value in fields.items()),
            need=" ".join(str(error).split()) or "values that agree with each other and with the layout",
            fix="set megatron.model",
        ) from error


def _set_pipeline(provider: ModelProvider, parallel: ParallelConfig) -> None:
    """Sets how pipeline stages exchange tensors.

    Without virtual pipelining every transfer is preceded by its shape (three integers), so micro-batches may differ in
    shape. The interleaved schedule sends in both directions at once, and would mistake the shapes from two neighbours
    for each other: `megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate_shapes` posts them
    in the same order on all ranks. Its micro-batches therefore have one shape, and its transfers the order of
    `megatron.core.pipeline_parallel.p2p_communication._p2p_ops`, which two stages need.

    Megatron frees the memory of an output once its transfer has begun. NCCL's allocator keeps it until the transfer
    ends; gloo would send data that is written to it later, so with gloo outputs are kept if transfers overlap.
    """
    provider.pipeline_dtype = provider.params_dtype
    interleaved = parallel.virtual_pipeline > 1
    provider.variable_seq_lengths = not interleaved
    if interleaved:
        provider.virtual_pipeline_model_parallel_size = parallel.virtual_pipeline
        provider.batch_p2p_comm = False
        provider.overlap_p2p_comm = parallel.overlap_transfers
        if parallel.overlap_transfers and device().type == "cpu":
            provider.deallocate_pipeline_outputs = False
    provider.num_layers_in_first_pipeline_stage = parallel.first_stage_layers or None
    provider.num_layers_in_last_pipeline_stage = parallel.last_stage_layers or None


def _mark_shards(model: ModelChunk) -> None:
    """Marks the weights that are sharded over the tensor-parallel group, as megatron-core does when it initialises
    them.

    `megatron.core.tensor_parallel.layers.ColumnParallelLinear`,
    `megatron.core.tensor_parallel.layers.RowParallelLinear` and
    `megatron.core.tensor_parallel.layers.VocabParallelEmbedding` mark only weights that they initialise. Unmarked
    weights would be treated as replicated: the gradient norm, and therefore clipping, would count only the shard of the
    group's first rank. Transformer Engine marks its linears itself.
    """
    for module in model.modules():
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if sharded and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dimension = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
