"""A bridge for SmolLM3, which Megatron-Bridge lacks: a Llama in which some layers have no rotary embedding.

Importing this module registers it.
"""

from __future__ import annotations

from types import SimpleNamespace

from megatron.core.models.gpt import GPTModel
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM

from nemo_popsd.runtime.cpu import adapt_megatron

adapt_megatron()  # Without CUDA, Megatron-Bridge cannot be imported before this.
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.models.llama.llama_bridge import LlamaBridge  # noqa: E402


@MegatronModelBridge.register_bridge(source=SmolLM3ForCausalLM, target=GPTModel, model_type="smollm3")
class SmolLM3Bridge(LlamaBridge):  # type: ignore[misc]  # Megatron-Bridge has no types
    """Bridge for the SmolLM3 of transformers. The names of the tensors are those of Llama."""

    def provider_bridge(self, hf_pretrained: SimpleNamespace) -> GPTModelProvider:
        """The provider for a transformers configuration, whose ``no_rope_layers`` has 1 for a layer that rotates."""
        provider = super().provider_bridge(hf_pretrained)
        provider.no_rope_freq = [int(not rotates) for rotates in hf_pretrained.config.no_rope_layers]
        return provider
