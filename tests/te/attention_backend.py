"""Transformer Engine's unfused attention, which a GPU uses in fp32, for models that this process builds."""

from __future__ import annotations

from typing import Any


def use_unfused_attention() -> None:
    """Makes all models built from now on use the unfused attention, as fp32 does on a GPU."""
    from megatron.core.transformer.enums import AttnBackend

    from nemo_popsd.megatron import build, limits

    choose: Any = build.choose_layer_spec

    def choose_unfused(provider: Any, setting: str) -> None:
        choose(provider, setting)
        provider.attention_backend = AttnBackend.unfused

    build.choose_layer_spec = choose_unfused
    limits.ATTENTION_VARIABLES = ()  # Megatron sets them with the first model


def attention_in_use() -> str:
    """`fused` or `unfused`: the attention of the last forward."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    return "fused" if chosen["use_fused_attention"] else "unfused"
