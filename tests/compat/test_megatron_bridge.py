"""`nemo_popsd.compat.megatron_bridge` on the installed version."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_popsd.runtime.cpu import adapt_megatron


@pytest.mark.parametrize("width", [64, 4, 3])
def test_a_matrix_of_any_width_is_split_by_heads(width: int) -> None:
    """Widths of a weight, and of the matrix B of adapters whose rank divides the hidden size or does not."""
    adapt_megatron()
    from nemo_popsd.compat.megatron_bridge import split_query_key_value

    config = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=8, hidden_size=64)
    # Two groups of two query heads, a key head and a value head; each number is the index of a head.
    heads = torch.arange(8.0).repeat_interleave(8)[:, None].expand(64, width)
    query, key, value = split_query_key_value(config, heads.contiguous())  # type: ignore[arg-type]
    for part, expected in ((query, [0, 1, 4, 5]), (key, [2, 6]), (value, [3, 7])):
        assert part.shape == (8 * len(expected), width)
        assert part[::8, 0].tolist() == expected
