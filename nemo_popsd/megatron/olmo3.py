"""OLMo-3's decoder layers, which megatron-core lacks: norms after attention and MLP, and over all heads of q and k.

    x ← x + norm(attention(x))          x ← x + norm(mlp(x))

Queries and keys are normalised over their full projection, all heads together. Three of four layers use a sliding
window and an unscaled rotary embedding; the others use a scaled one (YaRN). The provider sets both: Megatron's own
`window_size`, and `rope_ratio` here.

Shapes: s sequence, b batch, n query heads and g key-value heads of this tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from nemo_popsd.parallel.collectives import sum_for_shards
from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402

ShardedOffsets: TypeAlias = tuple[tuple[int, int, int], ...]
"""Axis, index of the shard and number of shards of each dimension that Megatron adds in front."""
ResidualEnd: TypeAlias = Callable[[tuple[Tensor, None], Tensor, float], Tensor]
"""End of a residual branch: output with bias, residual and dropout to the new residual."""
BiasDropoutAdd: TypeAlias = Callable[[bool, bool], ResidualEnd]
"""From `training` and `fused` to the end of a residual branch."""


class ProjectionNorm(MegatronModule):
    """RMSNorm over all heads of a projection that is sharded over the tensor-parallel group.

    The weight is sharded like the projection. One all-reduce of s·b fp32 numbers in the forward and one in the
    backward, because the output of every rank depends on the input of every rank.
    """

    def __init__(self, config: TransformerConfig, width: int, group: dist.ProcessGroup) -> None:
        """`width`: size of this rank's shard."""
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self._group = group
        self._eps = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, n, d] -> [s, b, n, d], computed in fp32."""
        wide = x.float()
        squares = sum_for_shards(wide.square().sum((-2, -1), keepdim=True), self._group)
        width = self.weight.numel() * self._group.size()
        scaled = wide * torch.rsqrt(squares / width + self._eps)
        return (self.weight.view(x.shape[-2:]) * scaled).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: ShardedOffsets = (), metadata: dict[str, object] | None = None
    ) -> ShardedStateDict:
        """The weight, sharded along its only dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


@dataclass
class Olmo3Provider(GPTModelProvider):
    """Megatron-Bridge's provider with the additional settings of OLMo-3."""

    rope_ratio: list[float] = field(default_factory=list)
    """Ratio of scaled to unscaled rotary frequencies, [d/2], in the layers without a window; empty without scaling."""
    rope_amplitude: float = 1.0
    """Factor of the sines and cosines of the scaled rotation."""


class Olmo3Attention(SelfAttention):
    """Self-attention with norms over the full query and key, and the scaled rotation in layers without a window."""

    def __init__(
        self,
        config: Olmo3Provider,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: object,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        group = self.pg_collection.tp
        # The norm over all keys needs complete key heads on each rank; other layouts were refused before.
        assert config.num_query_groups % group.size() == 0
        width = self.hidden_size_per_attention_head
        self.q_norm = ProjectionNorm(config, self.num_attention_heads_per_partition * width, group)
        self.k_norm = ProjectionNorm(config, self.num_query_groups_per_partition * width, group)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._rope_ratio: Tensor | None = None
        if config.rope_ratio and not windowed:
            self._rope_ratio = torch.tensor([*config.rope_ratio, *config.rope_ratio])

    def get_query_key_value_tensors(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised query [s, b, n, d] and key [s, b, g, d], and value [s, b, g, d]. Collectives: those of both norms.

        The amplitude of the rotary embedding scales queries and keys; here both factors are applied to the query.
        """
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query, key = self.q_norm(query), self.k_norm(key)
        if self._rope_ratio is not None:
            query = query * self.config.rope_amplitude**2
        return query, key, value

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        rotary_pos_emb: Tensor | tuple[Tensor, ...] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's forward with the rotary angles [s, 1, 1, d] of this layer."""
        if self._rope_ratio is not None and rotary_pos_emb is not None:
            self._rope_ratio = self._rope_ratio.to(hidden_states.device)
            rotary_pos_emb = (
                tuple(angles * self._rope_ratio for angles in rotary_pos_emb)
                if isinstance(rotary_pos_emb, tuple)
                else rotary_pos_emb * self._rope_ratio
            )
        result: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )
        return result


@dataclass
class Olmo3LayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules and the norm that follows attention and MLP."""

    post_norm: type[torch.nn.Module] | None = None


class Olmo3Layer(TransformerLayer):
    """A layer with a norm at the end, instead of the beginning, of its two residual branches."""

    def __init__(
        self, config: TransformerConfig, submodules: Olmo3LayerSubmodules, *args: object, **kwargs: object
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = build_module(
                submodules.post_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            setattr(self, name, norm)
        self.self_attn_bda: BiasDropoutAdd = partial(_normed, self.self_attn_bda, self.post_attention_layernorm)
        self.mlp_bda: BiasDropoutAdd = partial(_normed, self.mlp_bda, self.post_feedforward_layernorm)


def _normed(bias_dropout_add: BiasDropoutAdd, norm: torch.nn.Module, training: bool, fused: bool) -> ResidualEnd:
    """Megatron's end of a residual branch applied to the output of `norm`; OLMo-3 has no biases."""
    end = bias_dropout_add(training, fused)

    def call(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        assert bias is None
        return end((norm(output), None), residual, dropout)

    return call


def olmo3_layer_spec(backend: BackendSpecProvider, *, norm: type, core_attention: type) -> ModuleSpec:
    """The spec of an OLMo-3 layer with the linears of `backend`.

    Args:
        backend: megatron-core's `LocalSpecProvider` or `TESpecProvider`.
        norm: RMSNorm over the hidden size.
        core_attention: supports `window_size`.
    """
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    return ModuleSpec(
        module=Olmo3Layer,
        submodules=Olmo3LayerSubmodules(
            self_attention=ModuleSpec(
                module=Olmo3Attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core_attention, linear_proj=row),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            post_norm=norm,
        ),
    )


def transformer_engine_layer_spec(provider: Olmo3Provider) -> ModuleSpec:
    """The spec of an OLMo-3 layer with Transformer Engine."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    backend = TESpecProvider()
    norm = backend.layer_norm(rms_norm=True, for_qk=False)
    return olmo3_layer_spec(backend, norm=norm, core_attention=backend.core_attention())
