"""Keys and values of rows at different lengths, one slot for each, and the core attention that reads them.

Shapes: b rows of this forward, s new tokens of each, n query heads and g key-value heads of this tensor-parallel rank,
d head dimension, r reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.kernel_choice import cache_positions

_KNOWN_CORES = ("LocalCoreAttention", "TEDotProductAttention")


@dataclass(frozen=True)
class Prefill:
    """A forward that fills slots from their beginnings; rows are padded on the right."""

    slots: Tensor
    """[b] int64."""


@dataclass(frozen=True)
class Decode:
    """A forward of one token for each of the first b slots."""

    rows: Tensor
    """Numbers from 0 to below b, int64."""
    positions: Tensor
    """[b] int64, of the new tokens."""
    visible: dict[int | None, Tensor]
    """By window: 0 where a row sees one of the first r positions, else -inf, [b, 1, 1, r] in the queries' dtype."""


class CachedCoreAttention(torch.nn.Module):
    """Takes the place of a layer's core attention: puts new keys and values into the cache, attends to the cache.

    Keys are kept with their rotation, so that no step rotates them again. A step of decoding has static shapes: every
    row attends to the first r positions and hides by a mask what lies beyond its own length or window.

    Attributes:
        keys: [slots, g, capacity, d], or somewhat more positions (`cache_positions`); values alike.
        values: zeros at first, since a hidden position still is multiplied by 0.
    """

    def __init__(self, attention: Attention, slots: int, capacity: int, device: torch.device) -> None:
        """Allocates the layer's cache.

        Args:
            attention: the layer's attention, with its own core.
            slots: rows.
            capacity: positions of each.
            device: of the cache.

        Raises:
            UserError: the model's attention is of another kind than this one computes.
        """
        super().__init__()
        config = attention.config
        # Not a submodule: it stays where it is, and `modules()` is to find it once.
        self._inner = [attention.core_attention]
        kind = type(attention.core_attention).__name__
        if kind not in _KNOWN_CORES or config.softmax_type != "vanilla":
            raise UserError(
                "rollout",
                got=f"core attention {kind} with softmax_type={config.softmax_type!r}",
                need=f"one of {', '.join(_KNOWN_CORES)} with 'vanilla', which the cache can stand for",
                fix="use another model",
            )
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        shape = slots, groups, cache_positions(capacity, device.type), width
        self.keys = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.values = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.forward_of: Prefill | Decode | None = None
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number):
            self.window = config.window_size[0] + 1
        self._scale = width**-0.5 if config.softmax_scale is None else config.softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n·d]; takes also what Megatron gives besides."""
        step = self.forward_of
        if isinstance(step, Prefill):
            length = key.shape[0]
            self.keys[step.slots, :, :length] = key.permute(1, 2, 0, 3)
            self.values[step.slots, :, :length] = value.permute(1, 2, 0, 3)
            attended: Tensor = self._inner[0](query, key, value, *args, **kwargs)
            return attended
        return self.attend(query[0].unflatten(1, (key.shape[2], -1)), key[0], value[0])[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, g, n/g, d], [b, g, d], [b, g, d] -> [b, n·d]: one token of each of the first b slots."""
        step = self.forward_of
        assert isinstance(step, Decode)
        visible, count = step.visible[self.window], len(key)
        self.keys[step.rows, :, step.positions] = key
        self.values[step.rows, :, step.positions] = value
        # The query heads of a key-value head are that many queries: no copies of keys, and one mask for all.
        context = scaled_dot_product_attention(
            query,
            self.keys[:count, :, : visible.shape[-1]],
            self.values[:count, :, : visible.shape[-1]],
            attn_mask=visible,
            scale=self._scale,
        )
        return context.reshape(count, -1)


def attentions(chunks: Sequence[GPTModel]) -> Iterator[Attention]:
    """The attention of every layer of this rank."""
    return (layer.self_attention for chunk in chunks for layer in chunk.decoder.layers)


def decode_step(positions: Tensor, reach: int, windows: set[int | None], dtype: torch.dtype) -> Decode:
    """The step of rows whose new tokens are at `positions` [b], all of them before `reach` but for rows that ended."""
    distance = positions[:, None, None, None] - torch.arange(reach, device=positions.device)
    rows = torch.arange(len(positions), device=positions.device)
    shown = torch.zeros_like(distance, dtype=dtype)
    visible = {window: shown.masked_fill(distance < 0, -torch.inf) for window in windows}
    for window, mask in visible.items():
        if window is not None:
            mask.masked_fill_(distance >= window, -torch.inf)
    return Decode(rows, positions, visible)
