"""Cached forwards of the live model for drawing tokens, in any layout.

Shapes: B rows, s new tokens of each, H hidden size, V_pad padded vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.forward import hidden_states_only
from nemo_popsd.megatron.kernels import cached_attention
from nemo_popsd.megatron.kv_cache import CachedCoreAttention, Decode, Prefill, attentions, decode_step
from nemo_popsd.megatron.microbatches import FEWEST_TOKENS
from nemo_popsd.megatron.plain_layers import PlainLayers, are_plain

_SEQUENCE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""What megatron-core's modules decide sequence parallelism by when they run."""
_CONTEXT_GROUPS = ("cp_group",)
"""What attention and rotary embeddings decide context parallelism by when they run."""
_ROTATION_FLAGS = ("apply_rope_fusion", "fused_single_qkv_rope")
"""Transformer Engine's fused rotations know one position for all rows."""
_KNOWN_ROTATIONS = ("RotaryEmbedding", "YarnRotaryEmbedding")


@contextmanager
def whole_sequences(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Within, the model computes in evaluation mode on whole sequences: sequence and context parallelism are off.

    A token at a time cannot be split. Weights are not touched: each tensor-parallel rank applies its shards to all
    tokens, as it does without sequence parallelism, and each context-parallel rank is a replica.
    """
    with ExitStack() as restore:
        for chunk in chunks:
            restore.callback(chunk.train, chunk.training)
            chunk.eval()
        for module in [m for chunk in chunks for m in chunk.modules()] + [chunks[0].config]:
            for name in _SEQUENCE_FLAGS:
                _replace(restore, module, name, True, False)
            for name in _CONTEXT_GROUPS:
                _replace(restore, module, name, module.__dict__.get(name), None)
            # Megatron-Bridge's adapters gather and scatter by a flag of their own (peft/utils.py:616).
            _replace(restore, module, "disable_sequence_parallel_comm", False, True)
        if chunks[0].config.context_parallel_size > 1:
            _replace(restore, chunks[0].config, "context_parallel_size", chunks[0].config.context_parallel_size, 1)
            # Rotary embeddings cache what they cut for this rank by length alone (rotary_pos_embedding.py:160).
            forget = type(chunks[0].rotary_pos_emb).forward.cache_clear
            forget()
            restore.callback(forget)
        yield


def _replace(restore: ExitStack, owner: Any, name: str, value: Any, other: Any) -> None:
    """Sets `owner.name` to `other` until `restore` closes, if it is `value` and the owner's own."""
    if value is not None and owner.__dict__.get(name) == value:
        setattr(owner, name, other)
        restore.callback(setattr, owner, name, value)


class SlotDecoder:
    """Forwards of the live model over a cache with one slot for each row; rows may be of different lengths.

    Megatron's modules compute as they do in training. Two of them are replaced while it is open: each layer's core
    attention, by one that keeps keys and values (`CachedCoreAttention`), and the rotary embedding, by a table of
    angles from which each row takes its own position's. A step of decoding goes through the modules of the layers
    rather than through the layers, where these are megatron-core's own (`PlainLayers`). It has the same shapes
    whatever the rows are, but for the number of slots and the reach, and nothing in it waits for the host, so that a
    CUDA graph of it can be captured; the engine does not (`benchmarks.gpu` tries it).

    Attributes:
        slots: rows that the cache has room for.
        capacity: positions of each.
    """

    def __init__(self, chunks: Sequence[GPTModel], slots: int, capacity: int) -> None:
        """Allocates 2·slots·capacity·g·d elements for each layer of this rank; g key-value heads of this rank.

        Args:
            chunks: the model's, bare.
            slots: see the class.
            capacity: see the class.

        Raises:
            UserError: the model's attention is none that the cache can stand for.
        """
        self._chunks = list(chunks)
        self.slots, self.capacity = slots, capacity
        self._device = next(chunks[0].parameters()).device
        self._layers = [CachedCoreAttention(a, slots, capacity, self._device) for a in attentions(chunks)]
        self._dtype = chunks[0].config.params_dtype
        self._windows = {layer.window for layer in self._layers}
        self._rotations: list[_Rotation] = []
        caches = iter(self._layers)
        self._plain: list[PlainLayers | None] = []
        for chunk in chunks:
            own = [next(caches) for _ in chunk.decoder.layers]
            self._plain.append(PlainLayers(chunk, own) if are_plain(chunk) else None)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, the chunks decode and do nothing else; see also `whole_sequences`."""
        with whole_sequences(self._chunks), ExitStack() as restore:
            for owner in [self._chunks[0].config, *(a.config for a in attentions(self._chunks))]:
                for name in _ROTATION_FLAGS:
                    _replace(restore, owner, name, True, False)
            for attention, layer in zip(attentions(self._chunks), self._layers, strict=True):
                restore.callback(setattr, attention, "core_attention", attention.core_attention)
                attention.core_attention = layer
            self._rotations = []
            for chunk in self._chunks:
                original = getattr(chunk, "rotary_pos_emb", None)  # None: positions are not rotations
                if original is not None:
                    restore.callback(setattr, chunk, "rotary_pos_emb", original)
                    chunk.rotary_pos_emb = _Rotation(original, self.capacity)
                    self._rotations.append(chunk.rotary_pos_emb)
            yield

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on this rank."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in (layer.keys, layer.values))

    def prefill(self, slots: Tensor, inputs: Tensor) -> None:
        """Fills slots from their beginnings.

        What padding leaves in the cache is overwritten by the tokens that come after the row's own, before they see it.

        Args:
            slots: [B] int64.
            inputs: [B, s] int64, padded on the right with any token.
        """
        if inputs.shape[1] < FEWEST_TOKENS <= self.capacity:
            inputs = torch.nn.functional.pad(inputs, (0, FEWEST_TOKENS - inputs.shape[1]))
        positions = torch.arange(inputs.shape[1], device=self._device)
        for rotation in self._rotations:
            rotation.take(positions)
        self._forward(inputs, positions.expand_as(inputs), Prefill(slots))

    def next_logits(self, inputs: Tensor, positions: Tensor, reach: int) -> Tensor | None:
        """Logits [B, V_pad/tp] of this rank after one more token of each of the first B slots; on the last stage alone.

        Rows that are done may be among them: they get the token and position that they had, and their logits mean
        nothing; the slot's positions before that one stay as they are.

        Args:
            inputs: [B] int64.
            positions: [B] int64, of `inputs`.
            reach: more than the positions of all rows that are not done; attention looks at so many positions.
        """
        for rotation in self._rotations:
            rotation.take(positions[None])
        step = decode_step(positions, reach, self._windows, self._dtype)
        with cached_attention(self._device):
            hidden_1BH = self._forward(inputs[:, None], positions[:, None], step)
        if hidden_1BH is None:
            return None
        last = self._chunks[-1]
        shared = last.shared_embedding_or_output_weight() if last.share_embeddings_and_output_weights else None
        logits_1BV: Tensor = last.output_layer(hidden_1BH, weight=shared, runtime_gather_output=False)[0]
        return logits_1BV[0]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the first `length` positions of slots `source` [k] to slots `target` [k], which share none of them."""
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[target, :, :length] = cache[source, :, :length]

    def _forward(self, inputs: Tensor, positions: Tensor, step: Prefill | Decode) -> Tensor | None:
        """Hidden states [s, B, H] after the last layer, on the last stage alone.

        Under pipeline parallelism a token passes the stages, and under virtual pipelining passes them several times;
        each hop sends B·s·H numbers to the next stage, and while one stage computes the others wait. Collectives
        beside: those of the model's layers.
        """
        for layer in self._layers:
            layer.forward_of = step
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, stages = group.rank(), group.size()
        rows, length = inputs.shape
        config = self._chunks[0].config
        before, after = (dist.get_global_rank(group, (stage + hop) % stages) for hop in (-1, 1))
        output = None
        for number, chunk in enumerate(self._chunks):
            if stages > 1:
                received = None
                if (number, stage) != (0, 0):
                    received = torch.empty(
                        length, rows, config.hidden_size, dtype=config.params_dtype, device=inputs.device
                    )
                    dist.recv(received, before, group=group)
                chunk.set_input_tensor(received)
            output = self._through(number, inputs, positions, step)
            if (number, stage) != (len(self._chunks) - 1, stages - 1):
                dist.send(output.contiguous(), after, group=group)
                output = None
            chunk.set_input_tensor(None)
        return output

    def _through(self, number: int, inputs: Tensor, positions: Tensor, step: Prefill | Decode) -> Tensor:
        """States [s, B, H] after one chunk of this rank."""
        chunk, plain = self._chunks[number], self._plain[number]
        if plain is None or isinstance(step, Prefill):
            with hidden_states_only(chunk):
                hidden: Tensor = chunk(input_ids=inputs, position_ids=positions, attention_mask=None)
            return hidden
        if chunk.pre_process:
            hidden = chunk.embedding(input_ids=inputs, position_ids=positions)
        else:
            hidden = chunk.decoder.input_tensor
        return plain(hidden[0], self._rotations[number].angles[0, :, 0])[None]


class _Rotation(torch.nn.Module):
    """Stands for a chunk's rotary embedding: gives the angles of the positions that were last taken."""

    def __init__(self, original: torch.nn.Module, capacity: int) -> None:
        super().__init__()
        kind = type(original).__name__
        if kind not in _KNOWN_ROTATIONS:
            raise UserError(
                "rollout",
                got=f"rotary embedding {kind}",
                need=f"one of {', '.join(_KNOWN_ROTATIONS)}, whose angles depend on the position alone",
                fix="use another model",
            )
        found = original(capacity)
        self._table, *self._rest = found if isinstance(found, tuple) else (found,)
        self.angles = self._table

    def take(self, positions: Tensor) -> None:
        """Positions [s] that all rows have, or [s, B] of each row."""
        angles = self._table[positions]  # [s, 1, 1, d] or [s, B, 1, 1, d]
        self.angles = angles if positions.dim() == 1 else angles.squeeze(2)

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Not needed."""
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Angles [s, 1 or B, 1, d], in the form in which the original gives them."""
        return (self.angles, *self._rest) if self._rest else self.angles
