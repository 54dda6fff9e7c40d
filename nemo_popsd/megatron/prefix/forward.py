"""Computes final hidden states at response positions with each distinct token prefix computed once.

The layers are Megatron's, as in `nemo_popsd.megatron.forward`. During this forward, their core attention also reads
keys and values of other pieces of the same sequence (`CachedCoreAttention`, `Extend`), and rotary angles are looked up
by position.

Shapes: S tokens of a wave with padding, N states of response tokens that it computes, R_i response tokens of a
sequence, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_popsd.data.alignment import append_response, response_positions
from nemo_popsd.megatron.cached_layers import KNOWN_ROTATIONS, cached_layers
from nemo_popsd.megatron.forward import frozen_batch_states
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.kv_cache import KNOWN_CORES, CachedCoreAttention, Extend, attentions
from nemo_popsd.megatron.microbatches import FEWEST_TOKENS, ContextSequence, MicroBatch, TokenCount
from nemo_popsd.megatron.prefix.forest import PrefixForest
from nemo_popsd.megatron.prefix.waves import Wave, cached_positions, plan_waves
from nemo_popsd.megatron.response_routing import SequenceSplit, plan_route


def why_not_shared(chunks: Sequence[ModelChunk]) -> str | None:
    """Why `shared_hidden_states` does not support this model in its layout; None if it does. The same on all ranks."""
    config = chunks[0].config
    if config.context_parallel_size > 1:
        return "context parallelism"
    if config.expert_model_parallel_size > 1:
        return "expert parallelism"
    if config.window_size is not None:
        return "sliding windows"
    cores = {type(attention.core_attention).__name__ for attention in attentions(chunks)}
    if config.softmax_type != "vanilla" or not cores <= set(KNOWN_CORES):
        return f"core attention {', '.join(sorted(cores))} with softmax_type={config.softmax_type!r}"
    rotation = getattr(chunks[0], "rotary_pos_emb", None)
    if rotation is None:
        return "positions that are not rotary"
    name = type(rotation).__name__
    return None if name in KNOWN_ROTATIONS else f"rotary embedding {name}"


@torch.no_grad()
def shared_hidden_states(
    chunks: Sequence[ModelChunk], sequences: Sequence[ContextSequence], token_budget: int, cache_tokens: int
) -> tuple[list[Tensor], TokenCount]:
    """The result of `frozen_hidden_states` for `sequences`, up to rounding, and the number of computed tokens.

    Collectives: those of Megatron's forward and of `gather_response_states`. Keeps up to 2·min(cache_tokens, longest
    path)·g·d numbers for each layer of this rank between waves; g key-value heads of this rank, d head dimension.

    Args:
        chunks: the frozen weights, for which `why_not_shared` returns None.
        sequences: sequences of this data-parallel rank; the same on all ranks that share the model.
        token_budget: maximum number of tokens in a forward pass; a single node of the forest may be longer.
        cache_tokens: see `plan_waves`.

    Returns:
        One tensor [R_i, H] for each sequence on the last pipeline stage, an empty list on the others; and the count,
        over all ranks that share the tokens.
    """
    plan = _Plan.of(chunks, sequences, token_budget, cache_tokens)
    device = next(chunks[0].parameters()).device
    capacity = cached_positions([wave for wave, _ in plan.batches])
    layers = [CachedCoreAttention(attention, 1, capacity, device) for attention in attentions(chunks)]
    waves = {id(batch): wave for wave, batch in plan.batches}
    longest = max((len(sequence) for sequence in sequences), default=1)
    with cached_layers(chunks, layers, longest) as rotations:

        def before(batch: MicroBatch) -> None:
            for rotation in rotations:
                rotation.take(batch.position_ids[0])
            for layer in layers:
                layer.forward_of = Extend(waves[id(batch)])

        states = frozen_batch_states(chunks, [batch for _, batch in plan.batches], before=before)
    return (plan.by_sequence(states) if states else []), plan.count


@dataclass
class _Plan:
    """Waves as micro-batches, and the locations of the states of each sequence in them."""

    batches: list[tuple[Wave, MicroBatch]] = field(default_factory=list)
    runs: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """For each sequence, in the order of its response: index of the batch, first of its N states, number of states."""
    count: TokenCount = field(default_factory=TokenCount)

    @classmethod
    def of(
        cls, chunks: Sequence[ModelChunk], sequences: Sequence[ContextSequence], token_budget: int, cache_tokens: int
    ) -> _Plan:
        tokens = [append_response(sequence.prompt, sequence.response) for sequence in sequences]
        forest = PrefixForest.of(tokens)
        waves = plan_waves(forest, token_budget, cache_tokens)
        wave_of = {node: number for number, wave in enumerate(waves) for node in wave.nodes}
        plan, places = cls(), [list[int]() for _ in waves]
        for index, sequence in enumerate(sequences):
            wanted = range(len(sequence))[response_positions(len(sequence.prompt), len(sequence.response))]
            runs = []
            for number in forest.path(forest.ends[index]):
                node, wave = forest.nodes[number], wave_of[number]
                begin, end = max(node.begin, wanted.start), min(node.end, wanted.stop)
                if begin < end:
                    runs.append((wave, len(places[wave]), end - begin))
                    first = waves[wave].nodes[number] + begin - node.begin
                    places[wave] += range(first, first + end - begin)
            plan.runs.append(runs)
        plan._make_batches(chunks, waves, places)
        real = sum(map(len, tokens))
        computed = sum(wave.tokens for wave in waves)
        padding = sum(batch.shape[0] for _, batch in plan.batches) - computed
        plan.count = TokenCount(computed, padding, saved=real - computed)
        return plan

    def _make_batches(self, chunks: Sequence[ModelChunk], waves: Sequence[Wave], places: Sequence[list[int]]) -> None:
        """Pads the waves as the schedule and the layout require, and adds empty ones."""
        config, split = chunks[0].config, SequenceSplit.of(chunks[0])
        device = next(chunks[0].parameters()).device
        interleaved = len(chunks) > 1
        multiple = config.pipeline_model_parallel_size if interleaved else 1
        count = math.ceil(max(len(waves), 1) / multiple) * multiple
        padded = [*waves, *(Wave() for _ in range(count - len(waves)))]
        of_wave = [*places, *([] for _ in range(count - len(waves)))]
        step = split.total_multiple
        lengths = [math.ceil(max(FEWEST_TOKENS, wave.tokens) / step) * step for wave in padded]
        if interleaved:
            lengths = [max(lengths)] * count
        for wave, length, own in zip(padded, lengths, of_wave, strict=True):
            self.batches.append((wave, _batch(wave, length, own, split, device)))

    def by_sequence(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Collects the states of each sequence from those of each batch."""
        empty = states[0][:0]
        return [
            torch.cat([empty, *(states[batch][first : first + count] for batch, first, count in runs)])
            for runs in self.runs
        ]


def _batch(wave: Wave, length: int, places: Sequence[int], split: SequenceSplit, device: torch.device) -> MicroBatch:
    """`wave` as one packed sequence of `length` tokens; its route selects the states at `places`."""
    ids, positions = torch.zeros(2, 1, length, dtype=torch.long)
    for piece in wave.pieces:
        span = slice(piece.place, piece.place + len(piece.tokens))
        ids[0, span] = torch.tensor(piece.tokens)
        positions[0, span] = torch.arange(piece.begin, piece.begin + len(piece.tokens))
    columns = torch.zeros(len(places), dtype=torch.long)
    route = plan_route(split, [length], 1, torch.tensor(places, dtype=torch.long), columns, columns)
    return MicroBatch(
        sequences=[],
        response_lengths=[],
        response_ids=torch.zeros(0, dtype=torch.long, device=device),
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        packed=None,
        host_bounds=None,
        route=route.to(device),
        shape=(length, 1),
        padding=length - wave.tokens,
    )
