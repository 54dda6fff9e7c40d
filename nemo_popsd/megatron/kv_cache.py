"""A key-value cache whose slots have different lengths, and the core attention that reads it.

Shapes: b slots of this forward, s new tokens of each, n query heads and g key-value heads of this tensor-parallel rank,
d head dimension, r reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.kernel_choice import cache_positions
from nemo_popsd.megatron.kernels import suffix_attention
from nemo_popsd.megatron.prefix.waves import Wave

KNOWN_CORES = ("LocalCoreAttention", "TEDotProductAttention")
"""Classes of core attention that `CachedCoreAttention` can replace, with the softmax 'vanilla'."""


@dataclass(frozen=True)
class Prefill:
    """A forward that fills slots from position 0; prompts are padded on the right."""

    slots: Tensor
    """[b] int64."""


@dataclass(frozen=True)
class Decode:
    """A forward of one token for each of the first b slots."""

    slots: Tensor
    """0 to b - 1, int64."""
    positions: Tensor
    """Positions of the new tokens, [b] int64."""
    visible: dict[int | None, Tensor]
    """Additive mask by window: 0 if a slot attends to one of the first r positions, otherwise -inf; [b, 1, 1, r], in
    the dtype of the queries."""


@dataclass(frozen=True)
class Extend:
    """A forward of concatenated pieces of sequences (s tokens of one slot), which continue each other and the content
    of slot 0; tokens after the last piece are padding.
    """

    wave: Wave


class CachedCoreAttention(torch.nn.Module):
    """Replaces a layer's core attention: writes new keys and values to the cache and attends to the cache.

    Keys are stored rotated, so that no step rotates them again. A decoding step has static shapes: every slot attends
    to the first r positions, with a mask over those beyond its own length or window.

    Attributes:
        keys: [slots, g, capacity, d], or somewhat more positions (`cache_positions`).
        values: same shape; initialised with zeros, because a masked position is still multiplied by 0.
    """

    def __init__(self, attention: Attention, slots: int, capacity: int, device: torch.device) -> None:
        """Allocates the layer's cache.

        Args:
            attention: the layer's attention, with its own core.
            slots: number of slots.
            capacity: positions of each slot.
            device: device of the cache.

        Raises:
            UserError: this class does not compute the model's attention.
        """
        super().__init__()
        config = attention.config
        # In a list, so that it is not a submodule of two modules and `modules()` finds it once.
        self._inner = [attention.core_attention]
        name = type(attention.core_attention).__name__
        if name not in KNOWN_CORES or config.softmax_type != "vanilla":
            raise UserError(
                "rollout",
                got=f"core attention {name} with softmax_type={config.softmax_type!r}",
                need=f"one of {', '.join(KNOWN_CORES)} with 'vanilla', which the cache can replace",
                fix="use another model",
            )
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        shape = slots, groups, cache_positions(capacity, device.type), width
        self.keys = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.values = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.forward_of: Prefill | Decode | Extend | None = None
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number):
            self.window = config.window_size[0] + 1
        self._scale = width**-0.5 if config.softmax_scale is None else config.softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n·d]; accepts Megatron's other arguments."""
        step = self.forward_of
        if isinstance(step, Prefill):
            length = key.shape[0]
            self.keys[step.slots, :, :length] = key.permute(1, 2, 0, 3)
            self.values[step.slots, :, :length] = value.permute(1, 2, 0, 3)
            attended: Tensor = self._inner[0](query, key, value, *args, **kwargs)
            return attended
        if isinstance(step, Extend):
            return self._extend(step.wave, query, key, value)
        return self.attend(query[0].unflatten(1, (key.shape[2], -1)), key[0], value[0])[None]

    def _extend(self, wave: Wave, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[s, 1, n, d], [s, 1, g, d], [s, 1, g, d] -> [s, 1, n·d]; see `Extend`. Copies the keys read by each piece."""
        q_bnsd, k_bgsd, v_bgsd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        contexts = []
        for piece in wave.pieces:
            count = len(piece.tokens)
            spans = *piece.above, (piece.place, count)
            keys, values = (
                _joined([cache[:1, :, : piece.cached], *(x[:, :, place : place + n] for place, n in spans)])
                for cache, x in ((self.keys, k_bgsd), (self.values, v_bgsd))
            )
            own = q_bnsd[:, :, piece.place : piece.place + count]
            contexts.append(suffix_attention(own, keys, values, scale=self._scale).permute(2, 0, 1, 3).flatten(2))
        for place, count, position in wave.kept:
            for cache, x in ((self.keys, k_bgsd), (self.values, v_bgsd)):
                cache[0, :, position : position + count] = x[0, :, place : place + count]
        contexts.append(query.new_zeros(len(query) - wave.tokens, 1, query.shape[2] * query.shape[3]))
        return torch.cat(contexts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, g, n/g, d], [b, g, d], [b, g, d] -> [b, n·d]: one token of each of the first b slots."""
        step = self.forward_of
        assert isinstance(step, Decode)
        visible, count = step.visible[self.window], len(key)
        self.keys[step.slots, :, step.positions] = key
        self.values[step.slots, :, step.positions] = value
        # The query heads of a key-value head are treated as queries of one sequence: no copies of keys, one mask.
        context = scaled_dot_product_attention(
            query,
            self.keys[:count, :, : visible.shape[-1]],
            self.values[:count, :, : visible.shape[-1]],
            attn_mask=visible,
            scale=self._scale,
        )
        return context.reshape(count, -1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates [1, g, ·, d] along the positions; returns a single non-empty part without a copy."""
    parts = [part for part in parts if part.shape[2]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attentions(chunks: Sequence[ModelChunk]) -> Iterator[Attention]:
    """The attention of every layer of this rank."""
    return (layer.self_attention for chunk in chunks for layer in chunk.decoder.layers)


def decode_step(positions: Tensor, reach: int, windows: set[int | None], dtype: torch.dtype) -> Decode:
    """A step of slots with new tokens at `positions` [b], which are below `reach` except for finished slots."""
    distance = positions[:, None, None, None] - torch.arange(reach, device=positions.device)
    slots = torch.arange(len(positions), device=positions.device)
    shown = torch.zeros_like(distance, dtype=dtype)
    visible = {window: shown.masked_fill(distance < 0, -torch.inf) for window in windows}
    for window, mask in visible.items():
        if window is not None:
            mask.masked_fill_(distance >= window, -torch.inf)
    return Decode(slots, positions, visible)
