"""A second implementation of megatron-core's decoder layer, for one new token per slot in Megatron rollouts.

`SlotDecoder` uses it for every token after the prompt. Prompts, training and the frozen branches use Megatron's own
forward, and so does decoding if `are_plain` is false. It applies the same weights, norms, adapters and experts, but
avoids about 60 Python calls that Megatron's layer makes around a dozen operations; with one token per slot these cost
more than the arithmetic. On one CPU core Megatron's layers need 2.8 times as long for a token of the embedded model at
1 slot, 2.2 times at 8 and 1.6 times at 64 (`python -m benchmarks.plain_layers`).

What a layer computes depends on its configuration: `nemo_popsd.megatron.plain_fields` lists every field.

Shapes: B slots, H hidden size, n query heads and g key-value heads of this tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear, silu

from nemo_popsd.megatron.interfaces import LinearModule, ModelChunk
from nemo_popsd.megatron.kv_cache import CachedCoreAttention
from nemo_popsd.megatron.plain_fields import unsupported_fields

logger = logging.getLogger(__name__)


def are_plain(chunk: ModelChunk) -> bool:
    """Whether `PlainLayers` computes the same as the layers of `chunk`; logs the settings that prevent it."""
    unsupported = unsupported_fields(chunk.config)
    if unsupported:
        logger.warning("decoding uses Megatron's own layers, which is slower: %s", ", ".join(unsupported))
    if unsupported or chunk.position_embedding_type not in ("rope", "yarn"):
        return False
    return all(
        type(layer) is TransformerLayer
        and type(layer.self_attention) is SelfAttention
        and isinstance(layer.cross_attention, IdentityOp)
        for layer in chunk.decoder.layers
    )


class PlainLayers:
    """The decoder of one chunk for a step of decoding."""

    def __init__(self, chunk: ModelChunk, caches: Sequence[CachedCoreAttention]) -> None:
        """`caches` are those of the chunk's layers, in order."""
        self._chunk = chunk
        self._caches = list(caches)
        self._amplitude = _yarn_get_concentration_factor_from_config(chunk.config)
        self._layers = [_PlainLayer(layer) for layer in chunk.decoder.layers]

    def __call__(self, hidden_BH: Tensor, angles_Bd: Tensor) -> Tensor:
        """States [B, H] after the layers, and after the last norm if the chunk has it.

        Collectives: one all-reduce of [B, H] over the tensor-parallel group for attention and one for the MLP of each
        layer, as in the layers' own forward.

        Args:
            hidden_BH: embedded tokens, or the output of the previous stage.
            angles_Bd: rotation of each slot's position.
        """
        cosine, sine = ((f(angles_Bd) * self._amplitude).to(hidden_BH.dtype) for f in (torch.cos, torch.sin))
        half = angles_Bd.shape[-1] // 2
        # x ↦ x·cos + rotate_half(x)·sin, with the sign of rotate_half in the sine.
        signed = torch.cat([-sine[:, :half], sine[:, half:]], dim=-1)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            hidden_BH = layer(hidden_BH, cosine[:, None], signed[:, None], cache)
        norm = self._chunk.decoder.final_layernorm
        return hidden_BH if norm is None else norm(hidden_BH)


class _PlainLayer:
    def __init__(self, layer: TransformerLayer) -> None:
        self._layer, self._attention, self._mlp = layer, layer.self_attention, layer.mlp
        attention = self._attention
        self._groups, self._width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self._qkv, self._projection = _linear(attention.linear_qkv), _linear(attention.linear_proj)
        unrotated = attention.config.no_rope_freq
        self._rotates = not (unrotated and unrotated[layer.layer_number - 1])
        self._gated: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
        if _is_gated(layer.mlp):
            self._gated = _linear(layer.mlp.linear_fc1), _linear(layer.mlp.linear_fc2)

    def __call__(self, hidden_BH: Tensor, cosine: Tensor, sine: Tensor, cache: CachedCoreAttention) -> Tensor:
        """`cosine` and `sine` are [B, 1, d]; `sine` includes the sign of the rotation."""
        layer, attention = self._layer, self._attention
        mixed = self._qkv(layer.input_layernorm(hidden_BH)).unflatten(-1, (self._groups, -1, self._width))
        query, key, value = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
        if attention.q_layernorm is not None:
            query = attention.q_layernorm(query)
        if attention.k_layernorm is not None:
            key = attention.k_layernorm(key)
        if self._rotates:
            query, key = _rotated(query, cosine[:, None], sine[:, None]), _rotated(key, cosine, sine)
        hidden_BH = hidden_BH + self._projection(cache.attend(query, key, value))
        normed_BH = layer.pre_mlp_layernorm(hidden_BH)
        if self._gated is None:
            output, bias = self._mlp(normed_BH[None])
            output_BH: Tensor = output[0]
            return hidden_BH + (output_BH if bias is None else output_BH + bias)
        first, second = self._gated
        gate, up = first(normed_BH).chunk(2, dim=-1)
        return hidden_BH + second(silu(gate) * up)


def _is_gated(mlp: MegatronModule) -> bool:
    """Whether `mlp` is silu(gate)·up between two linears."""
    if type(mlp) is not MLP:
        return False
    config = mlp.config
    plain = not config.use_te_activation_func and not config.glu_linear_offset
    return bool(plain and config.gated_linear_unit and config.activation_func is silu)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the leading entries of the last dimension, as many as there are angles; the others are unchanged."""
    width = cosine.shape[-1]
    rotated = x if x.shape[-1] == width else x[..., :width]
    first, second = rotated.chunk(2, dim=-1)
    rotated = (rotated * cosine).addcmul_(torch.cat([second, first], dim=-1), sine)
    return rotated if x.shape[-1] == width else torch.cat([rotated, x[..., width:]], dim=-1)


def _linear(module: LinearModule) -> Callable[[Tensor], Tensor]:
    """A function [B, inputs] -> [B, outputs] for any linear, bias included; it reads the weights at each call."""
    if type(module) is ColumnParallelLinear and not module.gather_output:
        return lambda x: linear(x, module.weight, module.bias)
    if type(module) is RowParallelLinear and module.input_is_parallel:

        def row_parallel(x: Tensor) -> Tensor:
            output = linear(x, module.weight)
            if module.tp_group.size() > 1:
                dist.all_reduce(output, group=module.tp_group)
            return output if module.bias is None else output + module.bias

        return row_parallel

    def from_module(x: Tensor) -> Tensor:
        output, bias = module(x[None])
        return output[0] if bias is None else output[0] + bias

    return from_module
