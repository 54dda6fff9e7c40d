"""From an architecture to Megatron-core GPTModels on this rank. The one place that makes a GPTModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE, StudentConfig
from nemo_popsd.megatron.limits import refuse_impossible
from nemo_popsd.megatron.spec import choose_layer_spec
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import device


def build_chunks(provider: Any, student: StudentConfig, parallel: ParallelConfig) -> list[GPTModel]:
    """Builds this rank's part of the model, on its device, with weights still to be loaded.

    Args:
        provider: a fresh Megatron-Bridge ``GPTModelProvider`` with the architecture; changed in place.
        student: precision, adaptation and gradient checkpointing.
        parallel: the layout; Megatron's process groups must exist.

    Returns:
        The bare model chunks (no DDP, no adapters) in the order in which a token passes them: one, or
        `parallel.virtual_pipeline` of them. Parameters are fp32 or bf16. The vocabulary is padded to a multiple of 128
        times the tensor-parallel size.

    Raises:
        UserError: the architecture does not divide by the layout, the layers cannot compute it there, or the layers
            that are asked for are not installed.
    """
    refuse_impossible(provider, student, parallel)
    provider.tensor_model_parallel_size = parallel.tensor
    provider.sequence_parallel = parallel.sequence
    provider.pipeline_model_parallel_size = parallel.pipeline
    provider.context_parallel_size = parallel.context
    provider.expert_model_parallel_size = parallel.expert
    provider.expert_tensor_parallel_size = 1 if parallel.expert > 1 else parallel.tensor
    # The one dispatcher that takes micro-batches of unequal lengths; without experts it is not used.
    provider.moe_token_dispatcher_type = "alltoall"
    # Experts are balanced in pre-training; here the divergence alone is minimised.
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
    if student.recompute:
        provider.recompute_granularity = "full"
        provider.recompute_method = "uniform"
        provider.recompute_num_layers = 1
    choose_layer_spec(provider, student.layers)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    chunks = [provider.provide(vp_stage=stage) for stage in stages]
    for chunk in chunks:
        _mark_shards(chunk)
        chunk.to(device())
    return chunks


Model: TypeAlias = GPTModel | Sequence[GPTModel]
"""A model on this rank: its only chunk, or its chunks."""


def chunks_of(model: Model) -> list[GPTModel]:
    """The chunks of `model`."""
    return [model] if isinstance(model, GPTModel) else list(model)


def layout_of(model: GPTModel) -> ParallelConfig:
    """The layout that `model` was built for."""
    config = model.config
    return ParallelConfig(
        tensor=config.tensor_model_parallel_size,
        sequence=config.sequence_parallel,
        pipeline=config.pipeline_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
        context=config.context_parallel_size,
        expert=config.expert_model_parallel_size,
    )


def _set_pipeline(provider: Any, parallel: ParallelConfig) -> None:
    """How stages talk.

    Without chunks every transfer is preceded by its shape (three integers), so micro-batches may differ in shape. The
    interleaved schedule sends in both directions at once, where shapes of two neighbours would be taken for each other
    (p2p_communication.py:213 posts them in one order on all ranks): its micro-batches have one shape, and its transfers
    the order of `_p2p_ops`, which two stages need.
    """
    provider.pipeline_dtype = provider.params_dtype
    interleaved = parallel.virtual_pipeline > 1
    provider.variable_seq_lengths = not interleaved
    if interleaved:
        provider.virtual_pipeline_model_parallel_size = parallel.virtual_pipeline
        provider.batch_p2p_comm = False


def _mark_shards(model: GPTModel) -> None:
    """Marks the weights that are split over the tensor-parallel group, which megatron-core does while it initialises.

    Without initialisation (layers.py:855, 1201, 244) they would pass for copies, and the gradient norm, hence the
    clipping, would count those of the group's first rank alone. Transformer Engine marks its linears itself.
    """
    for module in model.modules():
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if sharded and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dimension = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
