"""From an architecture to a Megatron-core GPTModel on this rank. The one place that makes a GPTModel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from nemo_popsd.megatron.config import VOCABULARY_MULTIPLE, ParallelConfig, StudentConfig
from nemo_popsd.megatron.spec import choose_layer_spec
from nemo_popsd.runtime.distributed import device


def build_gpt(provider: Any, student: StudentConfig, parallel: ParallelConfig) -> GPTModel:
    """Builds this rank's part of the model, on its device, with weights still to be loaded.

    Args:
        provider: a fresh Megatron-Bridge ``GPTModelProvider`` with the architecture; changed in place.
        student: precision and gradient checkpointing.
        parallel: the layout; Megatron's process groups must exist.

    Returns:
        The bare model (no DDP, no adapters), parameters in fp32 or bf16. Its vocabulary is padded to a multiple of
        128 times the tensor-parallel size.
    """
    provider.tensor_model_parallel_size = parallel.tensor
    provider.should_pad_vocab = True
    provider.make_vocab_size_divisible_by = VOCABULARY_MULTIPLE
    provider.parallel_output = True
    provider.perform_initialization = False
    provider.hidden_dropout = provider.attention_dropout = 0.0
    provider.fp16 = False
    provider.bf16 = student.precision == "bf16"
    provider.params_dtype = torch.bfloat16 if provider.bf16 else torch.float32
    provider.autocast_dtype = provider.params_dtype
    if student.recompute:
        provider.recompute_granularity = "full"
        provider.recompute_method = "uniform"
        provider.recompute_num_layers = 1
    choose_layer_spec(provider)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model: GPTModel = provider.provide()
    _mark_shards(model)
    return model.to(device())


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
