"""Megatron-Bridge 0.3 and 0.6. Import after `nemo_popsd.runtime.cpu.adapt_megatron`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from megatron.bridge.models.conversion.param_mapping import split_qkv_weights

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor


def split_query_key_value(config: TransformerConfig, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the matrix [(n + 2·g)·d, width] of query, key and value, with any width.

    0.6 takes a width other than the hidden size for that of fp8 scales, unless it is passed.
    """
    if "feature_dim" in inspect.signature(split_qkv_weights).parameters:
        query, key, value = split_qkv_weights(config, joined, feature_dim=joined.shape[-1])
    else:
        query, key, value = split_qkv_weights(config, joined)
    return query, key, value
