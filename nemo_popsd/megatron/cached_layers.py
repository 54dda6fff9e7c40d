"""Layers that attend to a key-value cache, with a position given for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.kv_cache import CachedCoreAttention, attentions

_ROTATION_FLAGS = ("apply_rope_fusion", "fused_single_qkv_rope")
"""Transformer Engine's fused rotations support only one position for all slots."""
KNOWN_ROTATIONS = ("RotaryEmbedding", "YarnRotaryEmbedding")
"""Classes of rotary embeddings whose angles depend only on the position."""


def replace_attribute(restore: ExitStack, owner: object, name: str, value: object, other: object) -> None:
    """Sets `owner.name` to `other` until `restore` closes, if the instance has this attribute with `value`."""
    if value is not None and owner.__dict__.get(name) == value:
        setattr(owner, name, other)
        restore.callback(setattr, owner, name, value)


@contextmanager
def cached_layers(
    chunks: Sequence[ModelChunk], layers: Sequence[CachedCoreAttention], positions: int
) -> Iterator[list[RotationTable]]:
    """Context in which `layers` replace the core attention of the layers, and rotary angles are looked up by position;
    yields the tables of angles, or no table if there is no rotary embedding.

    Args:
        chunks: chunks of the model, without DDP.
        layers: one core attention for each layer of this rank, in order.
        positions: number of positions in the tables.
    """
    with ExitStack() as restore:
        for owner in [chunks[0].config, *(attention.config for attention in attentions(chunks))]:
            for name in _ROTATION_FLAGS:
                replace_attribute(restore, owner, name, True, False)
        for attention, layer in zip(attentions(chunks), layers, strict=True):
            restore.callback(setattr, attention, "core_attention", attention.core_attention)
            attention.core_attention = layer
        rotations = []
        for chunk in chunks:
            original = getattr(chunk, "rotary_pos_emb", None)  # None without rotary embeddings
            if original is not None:
                restore.callback(setattr, chunk, "rotary_pos_emb", original)
                chunk.rotary_pos_emb = RotationTable(original, positions)
                rotations.append(chunk.rotary_pos_emb)
        yield rotations


class RotationTable(torch.nn.Module):
    """Replaces a chunk's rotary embedding: returns the angles of the positions that `take` selected."""

    def __init__(self, original: torch.nn.Module, capacity: int) -> None:
        """Computes the angles of `capacity` positions.

        Raises:
            UserError: the angles of `original` are not known to depend only on the position.
        """
        super().__init__()
        name = type(original).__name__
        if name not in KNOWN_ROTATIONS:
            raise UserError(
                "rollout",
                got=f"rotary embedding {name}",
                need=f"one of {', '.join(KNOWN_ROTATIONS)}, whose angles depend only on the position",
                fix="use another model",
            )
        table = original(capacity)
        self._table, *self._rest = table if isinstance(table, tuple) else (table,)
        self.angles = self._table

    def take(self, positions: Tensor) -> None:
        """Selects positions, [s] for all slots or [s, B] for each."""
        angles = self._table[positions]  # [s, 1, 1, d] or [s, B, 1, 1, d]
        self.angles = angles if positions.dim() == 1 else angles.squeeze(2)

    def get_rotary_seq_len(self, *args: object) -> int:
        """Not needed."""
        return 0

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """Angles [s, 1 or B, 1, d], in the form in which the original module returns them."""
        return (self.angles, *self._rest) if self._rest else self.angles
