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

_KNOWN_CORES = ("LocalCoreAttention", "TEDotProductAttention")


@dataclass(frozen=True)
class Prefill:
    """A forward that fills slots from their beginnings; rows are padded on the right."""

    slots: Tensor
    """[b] int64."""


@dataclass(frozen=True)
class Decode:
    """A forward of one token for each of the first b slots."""

    positions: Tensor
    """[b] int64, of the new tokens."""
    visible: dict[int | None, Tensor]
    """By window: which of the first r positions each row sees, [b, 1, 1, r] bool."""


class CachedCoreAttention(torch.nn.Module):
    """Takes the place of a layer's core attention: puts new keys and values into the cache, attends to the cache.

    Keys are kept with their rotation, so that no step rotates them again. A step of decoding has static shapes: every
    row attends to the first r positions and hides by a mask what lies beyond its own length or window.

    Attributes:
        keys: [slots, g, capacity, d]; values alike.
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
                mend="use another model",
            )
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        shape = slots, groups, capacity, width
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
        assert step is not None
        rows = torch.arange(key.shape[1], device=key.device)
        self.keys[rows, :, step.positions] = key[0]
        self.values[rows, :, step.positions] = value[0]
        visible = step.visible[self.window]
        count, (groups, reach) = key.shape[1], (self.keys.shape[1], visible.shape[-1])
        # The query heads of a key-value head as that many queries: no copies of keys, and one mask for all.
        context = scaled_dot_product_attention(
            query[0].unflatten(1, (groups, -1)),
            self.keys[:count, :, :reach],
            self.values[:count, :, :reach],
            attn_mask=visible,
            scale=self._scale,
        )
        return context.reshape(1, count, -1)


def attentions(chunks: Sequence[GPTModel]) -> Iterator[Attention]:
    """The attention of every layer of this rank."""
    return (layer.self_attention for chunk in chunks for layer in chunk.decoder.layers)


def decode_step(positions: Tensor, reach: int, windows: set[int | None]) -> Decode:
    """The step of rows whose new tokens are at `positions` [b], all of them before `reach` but for rows that ended."""
    distance = positions[:, None] - torch.arange(reach, device=positions.device)
    past = (distance >= 0)[:, None, None]
    return Decode(positions, {w: past if w is None else past & (distance < w)[:, None, None] for w in windows})
