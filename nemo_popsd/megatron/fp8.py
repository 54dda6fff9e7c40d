"""FP8 in the linears of the layers: the fields for building a model, and the context in which a pass uses FP8.

Megatron's ``TransformerBlock`` reads ``TransformerConfig.fp8`` in each forward and, if it is set, enters Transformer
Engine's autocast around each layer, or under delayed scaling around all layers. All modules of a model share one
configuration object. A model is built with ``fp8`` set, so that Megatron checks it; then the field is set to None. A
pass is computed in bf16 unless it runs in `in_fp8`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemo_popsd.compat.transformer_engine import fp8_obstacle
from nemo_popsd.errors import UserError
from nemo_popsd.megatron import spec
from nemo_popsd.megatron.config import FP8_MULTIPLES, FP8Config, StudentConfig
from nemo_popsd.megatron.interfaces import ModelChunk, ModelProvider
from nemo_popsd.parallel.config import ParallelConfig


def refuse_fp8(provider: ModelProvider, student: StudentConfig, parallel: ParallelConfig, fp8: FP8Config) -> None:
    """Refuses FP8 if the machine, the model or the layout does not support it; does nothing if FP8 is off.

    Args:
        provider: the architecture.
        student: the layers.
        parallel: the layout.
        fp8: recipe and passes.

    Raises:
        UserError: the message names the setting.
    """
    if not fp8.passes:
        return
    on, off = f"{fp8.passes[0]}=true", " and ".join(f"{name}=false" for name in fp8.passes)
    if not spec.on_transformer_engine(student.layers):
        raise UserError(
            "layers",
            got=f"{on} with local layers (student.layers={student.layers})",
            need="Transformer Engine and a GPU",
            fix=f"set {off}",
        )
    if obstacle := fp8_obstacle(fp8.recipe):
        fix = f"set another fp8.recipe, or {off}"
        raise UserError("environment", got=f"{on} with fp8.recipe={fp8.recipe}", need=obstacle, fix=fix)
    if provider.num_moe_experts:
        raise UserError(
            "model",
            got=f"{on} with a mixture of {provider.num_moe_experts} experts",
            need="a dense model: the number of tokens per expert is not a multiple of the number that FP8 needs",
            fix=f"set {off}",
        )
    multiple = FP8_MULTIPLES[fp8.recipe]
    for name, width in linear_widths(provider, parallel.tensor).items():
        if width % multiple:
            raise UserError(
                "model",
                got=f"{on} with fp8.recipe={fp8.recipe} and {name} {width} on each of {parallel.tensor} "
                "tensor-parallel ranks",
                need=f"a multiple of {multiple}",
                fix=f"set parallel.tensor, another fp8.recipe, or {off}",
            )
    stage = provider.num_layers // parallel.pipeline
    if max(fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16) > stage:
        raise UserError(
            "model",
            got=f"fp8.num_layers_at_start_in_bf16={fp8.num_layers_at_start_in_bf16}, "
            f"fp8.num_layers_at_end_in_bf16={fp8.num_layers_at_end_in_bf16} with {provider.num_layers} layers and "
            f"parallel.pipeline={parallel.pipeline}",
            need=f"at most {stage}, the layers of a stage, at each end",
            fix="set fewer",
        )


def linear_widths(provider: ModelProvider, tensor: int) -> dict[str, int]:
    """Widths of inputs and outputs of the linears of a dense layer on one of `tensor` ranks, by description."""
    heads = provider.num_attention_heads
    channels = provider.kv_channels or provider.hidden_size // heads
    groups = provider.num_query_groups or heads
    gate = 2 if provider.gated_linear_unit else 1
    return {
        "a hidden size of": provider.hidden_size,
        "queries, keys and values of width": (heads + 2 * groups) * channels // tensor,
        "attention of width": heads * channels // tensor,
        "gate and up projections of width": gate * provider.ffn_hidden_size // tensor,
        "an MLP of width": provider.ffn_hidden_size // tensor,
    }


def set_fp8(provider: ModelProvider, fp8: FP8Config) -> None:
    """Sets the fields with which Megatron builds and checks a model for FP8; does nothing if FP8 is off.

    Scales are reduced only over tensor-parallel and context-parallel ranks (``tp_only_amax_red``), because
    data-parallel ranks may have different numbers of micro-batches, and under delayed scaling each forward pass is a
    collective.
    """
    if not fp8.passes:
        return
    provider.fp8 = fp8.format
    provider.fp8_recipe = fp8.recipe
    provider.tp_only_amax_red = True
    provider.first_last_layers_bf16 = fp8.layers_in_bf16 > 0
    provider.num_layers_at_start_in_bf16 = fp8.num_layers_at_start_in_bf16
    provider.num_layers_at_end_in_bf16 = fp8.num_layers_at_end_in_bf16


@contextmanager
def in_fp8(chunks: Sequence[ModelChunk], fp8: FP8Config, passes: str) -> Iterator[None]:
    """Context in which the linears of `chunks` compute in FP8 if `fp8` enables it for these passes.

    Micro-batches created in the context are padded to the number of tokens that FP8 needs (`SequenceSplit.of`).
    Transformer Engine keeps quantised weights from one micro-batch to the next; the first micro-batch in the context
    quantises them again, since an update may have changed the weights. The backward pass of an FP8 forward pass is also
    in FP8; recomputation reads the configuration again, so the backward pass must run inside the context.

    Args:
        chunks: chunks of this rank, without DDP.
        fp8: recipe and passes.
        passes: `frozen`, `rollouts` or `training`.
    """
    if not getattr(fp8, passes):
        yield
        return
    try:
        for chunk in chunks:
            chunk.config.fp8 = fp8.format
            chunk.set_is_first_microbatch()
        yield
    finally:
        for chunk in chunks:
            chunk.config.fp8 = None
