"""Popular models that are not supported, with the features that are missing for each.

The error for such a model states the reason, like the table in docs/support.md. Every model that
`nemo_popsd.checkpoint.model_families` does not list is refused, whether or not it is listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PICTURES = "it has an image encoder"
_DELTA_NET = "gated delta net layers (linear attention), which Megatron-core neither runs without CUDA nor decodes"
_GATED = f"{_DELTA_NET}, an output gate of attention and RMSNorm with zero-centred weights"
_GEMMA_4 = (
    "layers with norms on both sides of attention and MLP and a scale of their own, two widths of heads, two rotary "
    "embeddings, an unlearned norm of values; by size also keys used as values, keys and values shared between layers, "
    "embeddings in each layer, a soft cap of logits, experts beside the MLP"
)
_NO_BRIDGE = "Megatron-Bridge has no bridge for it"

MISSING: Mapping[str, str] = MappingProxyType(
    {
        "exaone4": (
            "norms after attention and MLP together with norms of each head, and, with sliding windows, layers without "
            "rotary embedding"
        ),
        "gemma4": f"{_PICTURES}; {_GEMMA_4}",
        "gemma4_text": _GEMMA_4,
        "glm4": f"{_NO_BRIDGE}; norms on both sides of attention and MLP",
        "glm4_moe": "layers with and without experts, a router with sigmoid scores and biases, shared experts",
        "gpt_oss": (
            "attention sinks (softmax_type=learnable), biases of experts and router, a clamped activation of experts"
        ),
        "ministral3": f"{_NO_BRIDGE}; a scale of queries by position (llama_4_scaling_beta)",
        "mistral3": f"{_PICTURES}; in Ministral 3 a scale of queries by position (llama_4_scaling_beta)",
        "olmo_hybrid": f"{_NO_BRIDGE}; {_DELTA_NET}",
        "phi3": f"{_NO_BRIDGE}; matrices that hold several projections",
        "qwen3_5": f"{_PICTURES}; {_GATED}",
        "qwen3_5_moe": f"{_PICTURES}; {_GATED}; a gated shared expert",
        "qwen3_5_moe_text": f"{_GATED}; a gated shared expert",
        "qwen3_5_text": _GATED,
        "qwen3_next": f"{_GATED}; a gated shared expert",
        "seed_oss": _NO_BRIDGE,
    }
)
"""Missing features by ``model_type``."""
