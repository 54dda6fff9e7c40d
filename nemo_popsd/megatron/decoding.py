"""Forward passes of the live model with a key-value cache, to generate tokens in any layout.

Shapes: B slots, s new tokens of each, H hidden size, V_pad padded vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

from nemo_popsd.megatron.cached_layers import RotationTable, cached_layers, replace_attribute
from nemo_popsd.megatron.config import FP8_MULTIPLES, FP8Config
from nemo_popsd.megatron.forward import hidden_states_only
from nemo_popsd.megatron.fp8 import in_fp8
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.kernels import cached_attention
from nemo_popsd.megatron.kv_cache import CachedCoreAttention, Decode, Prefill, attentions, decode_step
from nemo_popsd.megatron.microbatches import FEWEST_TOKENS
from nemo_popsd.megatron.plain_layers import PlainLayers, are_plain

_SEQUENCE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes that switch sequence parallelism in megatron-core's modules at run time."""
_CONTEXT_GROUPS = ("cp_group",)
"""Attributes that switch context parallelism in attention and rotary embeddings at run time."""


@contextmanager
def full_sequences(chunks: Sequence[ModelChunk]) -> Iterator[None]:
    """Context in which the model is in evaluation mode, with sequence and context parallelism off.

    A single token cannot be split. Weights do not change: each tensor-parallel rank applies its shards to all tokens,
    as it does without sequence parallelism, and each context-parallel rank is a replica.
    """
    with ExitStack() as restore:
        for chunk in chunks:
            restore.callback(chunk.train, chunk.training)
            chunk.eval()
        for module in [m for chunk in chunks for m in chunk.modules()] + [chunks[0].config]:
            for name in _SEQUENCE_FLAGS:
                replace_attribute(restore, module, name, True, False)
            for name in _CONTEXT_GROUPS:
                replace_attribute(restore, module, name, module.__dict__.get(name), None)
            # Adapters have a flag of their own, see `megatron.bridge.peft.utils.ParallelLinearAdapter.forward`.
            replace_attribute(restore, module, "disable_sequence_parallel_comm", False, True)
        if chunks[0].config.context_parallel_size > 1:
            replace_attribute(
                restore, chunks[0].config, "context_parallel_size", chunks[0].config.context_parallel_size, 1
            )
            # `megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.forward` caches this rank's
            # part by the length only.
            forget = type(chunks[0].rotary_pos_emb).forward.cache_clear
            forget()
            restore.callback(forget)
        yield


class SlotDecoder:
    """Forward passes of the live model over a cache of slots, whose sequences may have different lengths.

    Megatron's modules compute as in training, except for two that are replaced while the decoder is open: the core
    attention of each layer by one that caches keys and values (`CachedCoreAttention`), and the rotary embedding by a
    table of angles that each slot indexes by its position. If the layers are megatron-core's own, a decoding step calls
    their inner modules directly (`PlainLayers`). Its shapes depend only on the number of slots and the reach, and it
    never synchronises with the host, so it can be captured as a CUDA graph; the engine does not do this
    (`benchmarks.gpu` does).

    Attributes:
        slots: number of slots in the cache.
        capacity: positions of each slot.
    """

    def __init__(
        self, chunks: Sequence[ModelChunk], slots: int, capacity: int, *, fp8: FP8Config | None = None
    ) -> None:
        """Allocates 2·slots·capacity·g·d elements for each layer of this rank, with g key-value heads of this rank.

        In FP8, slots and capacity are rounded up to the required multiple of tokens, and Megatron's own layers compute
        each step.

        Args:
            chunks: chunks of the model, without DDP.
            slots: see the class.
            capacity: see the class.
            fp8: whether the linears compute in FP8 (`rollouts`), and how.

        Raises:
            UserError: the cache cannot replace the model's attention.
        """
        self._chunks, self._fp8 = list(chunks), fp8 or FP8Config()
        self._multiple = FP8_MULTIPLES[self._fp8.recipe] if self._fp8.rollouts else 1
        slots, capacity = (count + -count % self._multiple for count in (slots, capacity))
        self.slots, self.capacity = slots, capacity
        self._device = next(chunks[0].parameters()).device
        self._layers = [CachedCoreAttention(a, slots, capacity, self._device) for a in attentions(chunks)]
        self._dtype = chunks[0].config.params_dtype
        self._windows = {layer.window for layer in self._layers}
        self._rotations: list[RotationTable] = []
        caches = iter(self._layers)
        self._plain: list[PlainLayers | None] = []
        for chunk in chunks:
            own = [next(caches) for _ in chunk.decoder.layers]
            plain = are_plain(chunk) and not self._fp8.rollouts
            self._plain.append(PlainLayers(chunk, own) if plain else None)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Context in which the chunks can only decode; see also `full_sequences`."""
        with (
            full_sequences(self._chunks),
            in_fp8(self._chunks, self._fp8, "rollouts"),
            cached_layers(self._chunks, self._layers, self.capacity) as self._rotations,
        ):
            yield

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on this rank."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in (layer.keys, layer.values))

    def prefill(self, slots: Tensor, inputs: Tensor) -> None:
        """Fills slots from position 0.

        Keys and values of padding are overwritten by the tokens after the prompt before any token attends to them.

        Args:
            slots: [B] int64.
            inputs: [B, s] int64, padded on the right with any token.
        """
        if inputs.shape[1] < FEWEST_TOKENS <= self.capacity:
            inputs = pad(inputs, (0, FEWEST_TOKENS - inputs.shape[1]))
        if excess := inputs.shape[1] % self._multiple:
            inputs = pad(inputs, (0, self._multiple - excess))
        positions = torch.arange(inputs.shape[1], device=self._device)
        for rotation in self._rotations:
            rotation.take(positions)
        self._forward(inputs, positions.expand_as(inputs), Prefill(slots))

    def next_logits(self, inputs: Tensor, positions: Tensor, reach: int) -> Tensor | None:
        """Logits [B, V_pad/tp] of this rank after one more token of each of the first B slots; on the last stage only.

        Finished slots may be included with their last token and position: their logits are meaningless, and the earlier
        positions of the slot do not change.

        Args:
            inputs: [B] int64.
            positions: positions of `inputs`, [B] int64.
            reach: number of positions that attention covers, more than the position of any unfinished slot.
        """
        count = len(inputs)
        if excess := count % self._multiple:
            inputs, positions = (pad(x, (0, self._multiple - excess)) for x in (inputs, positions))
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
        return logits_1BV[0, :count]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the first `length` positions of slots `source` [k] to slots `target` [k]; no slot may be in both."""
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[target, :, :length] = cache[source, :, :length]

    def _forward(self, inputs: Tensor, positions: Tensor, step: Prefill | Decode) -> Tensor | None:
        """Hidden states [s, B, H] after the last layer, on the last stage only.

        Under pipeline parallelism a token passes the stages one after the other, several times under virtual
        pipelining. Each transfer sends B·s·H numbers to the next stage, and the other stages wait while one computes.
        The layers use their own collectives in addition.
        """
        for layer in self._layers:
            layer.forward_of = step
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, stages = group.rank(), group.size()
        slots, length = inputs.shape
        config = self._chunks[0].config
        before, after = (dist.get_global_rank(group, (stage + hop) % stages) for hop in (-1, 1))
        output = None
        for index, chunk in enumerate(self._chunks):
            if stages > 1:
                received = None
                if (index, stage) != (0, 0):
                    received = torch.empty(
                        length, slots, config.hidden_size, dtype=config.params_dtype, device=inputs.device
                    )
                    dist.recv(received, before, group=group)
                chunk.set_input_tensor(received)
            output = self._through(index, inputs, positions, step)
            if (index, stage) != (len(self._chunks) - 1, stages - 1):
                dist.send(output.contiguous(), after, group=group)
                output = None
            chunk.set_input_tensor(None)
        return output

    def _through(self, index: int, inputs: Tensor, positions: Tensor, step: Prefill | Decode) -> Tensor:
        """States [s, B, H] after one chunk of this rank."""
        chunk, plain = self._chunks[index], self._plain[index]
        if plain is None or isinstance(step, Prefill):
            with hidden_states_only(chunk):
                hidden: Tensor = chunk(input_ids=inputs, position_ids=positions, attention_mask=None)
            return hidden
        if chunk.pre_process:
            hidden = chunk.embedding(input_ids=inputs, position_ids=positions)
        else:
            hidden = chunk.decoder.input_tensor
        return plain(hidden[0], self._rotations[index].angles[0, :, 0])[None]
