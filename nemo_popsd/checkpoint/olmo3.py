"""A bridge for OLMo-3, which Megatron-Bridge lacks: configuration and names. Importing this module registers it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from transformers import Olmo3ForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_popsd.compat.transformers import rotary_scaling, rotary_theta, without_rotary_scaling
from nemo_popsd.megatron.olmo3 import Olmo3Provider, transformer_engine_layer_spec

# Imported after nemo_popsd.megatron.olmo3, which calls `adapt_megatron`: without CUDA the import fails earlier.
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # isort: skip
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # isort: skip
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping  # isort: skip

AutoMapping.register_module_type("ProjectionNorm", "column")

_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.*.post_attention_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.post_feedforward_layernorm.weight": "model.layers.*.post_feedforward_layernorm.weight",
    "decoder.layers.*.self_attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "decoder.layers.*.self_attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "decoder.layers.*.mlp.linear_fc2.weight": "model.layers.*.mlp.down_proj.weight",
}


class _Pretrained(Protocol):
    """The object that Megatron-Bridge passes: a model or a substitute; only its configuration is used."""

    config: PretrainedConfig


@MegatronModelBridge.register_bridge(
    source=Olmo3ForCausalLM, target=GPTModel, provider=Olmo3Provider, model_type="olmo3"
)
class Olmo3Bridge(MegatronModelBridge):  # type: ignore[misc]  # Megatron-Bridge has no types
    """Bridge for the OLMo-3 of transformers."""

    def provider_bridge(self, hf_pretrained: _Pretrained) -> Olmo3Provider:
        """The provider for a transformers configuration. Layers have either a window or a scaled rotation."""
        config = hf_pretrained.config
        # Without the scaling, which Megatron would apply in every layer.
        unscaled = SimpleNamespace(config=without_rotary_scaling(config))
        provider: Olmo3Provider = super().provider_bridge(unscaled)
        provider.transformer_layer_spec = transformer_engine_layer_spec
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.position_embedding_type = "rope"
        provider.add_bias_linear = provider.add_qkv_bias = False
        provider.qk_layernorm = False  # Megatron's norm covers each head separately.
        provider.kv_channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        windowed = [layer_type == "sliding_attention" for layer_type in config.layer_types]
        if any(windowed):
            # The window of transformers includes the token itself, that of Megatron only the tokens before it.
            provider.window_size = (config.sliding_window - 1, 0)
            provider.window_attn_skip_freq = [int(window) for window in windowed]
        scaling = rotary_scaling(config)
        if scaling is not None:
            rope_type = scaling.get("rope_type") or scaling["type"]
            scaled, provider.rope_amplitude = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
            exponents = torch.arange(0, provider.kv_channels, 2, dtype=torch.int64).float() / provider.kv_channels
            unscaled_frequencies = 1.0 / rotary_theta(config) ** exponents
            provider.rope_ratio = (scaled / unscaled_frequencies).tolist()
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Map from the names of Megatron's parameters to those of transformers."""
        layer, attention = "decoder.layers.*", "model.layers.*.self_attn"
        return MegatronMappingRegistry(
            *(AutoMapping(megatron_param=megatron, hf_param=huggingface) for megatron, huggingface in _NAMES.items()),
            QKVMapping(
                megatron_param=f"{layer}.self_attention.linear_qkv.weight",
                q=f"{attention}.q_proj.weight",
                k=f"{attention}.k_proj.weight",
                v=f"{attention}.v_proj.weight",
            ),
            GatedMLPMapping(
                megatron_param=f"{layer}.mlp.linear_fc1.weight",
                gate="model.layers.*.mlp.gate_proj.weight",
                up="model.layers.*.mlp.up_proj.weight",
            ),
        )
