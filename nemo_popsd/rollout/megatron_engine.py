"""The engine in the training processes: it decodes with the live weights, in the layout of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_popsd.errors import StopRequested
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.megatron.decoding import SlotDecoder
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.parallel.vocabulary import VocabShard
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.sampling import sample_tokens, uniforms
from nemo_popsd.rollout.scheduler import PREFILL_TOKENS, Admission, DecodingSequence, SlotSchedule, reach_of


class MegatronEngine:
    """Decodes sequences with continuous batching: one token per sequence and step.

    Each sequence has a slot of a cache and its own position in it (`SlotDecoder`, `SlotSchedule`). When slots are free,
    several prompts are prefilled together, each once for all sequences that share it. When no sequence waits, the
    remaining ones are compacted into the leading slots, so that a step computes as few slots as possible.

    Tensor parallelism: logits stay sharded; `sample_tokens` documents its collectives (with top-k, one all-gather of
    [B, k + 1] numbers), and all ranks sample the same token. Sequence parallelism is off during decoding.
    Context-parallel ranks split the sequences and exchange the responses at the end (one gather of objects). Pipeline
    stages pass on each token and wait for each other, so decoding takes as long as on one stage; they receive the
    sampled tokens from the last stage (a broadcast of [B, 2] float64). Ranks that share experts all decode the same
    sequences, those of all of them, and receive the tokens from one of them (the same broadcast), since their rounding
    may differ.

    megatron-core's own dynamic engine is not used. Its attention needs flash-attn
    (`megatron.core.transformer.attention.Attention.forward`), has no sliding windows
    (`megatron.core.transformer.attention.Attention._flash_attention_3_forward_wrapper`) and refuses virtual pipelines
    (`megatron.core.transformer.attention.Attention._get_pp_layer_offset_for_inference`). Its logits are gathered
    (`megatron.core.models.gpt.gpt_model.GPTModel._postprocess`), and one generator samples for the complete batch
    (`megatron.core.inference.text_generation_controllers.text_generation_controller.TextGenerationController`), so that
    a response depends on the others in the batch.
    """

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        *,
        vocab_size: int,
        batch_rows: int,
        cache_tokens: int,
        weights_version: Callable[[], int],
        stop_requested: Callable[[], bool] = lambda: False,
        fp8: FP8Config | None = None,
    ) -> None:
        """Keeps references only.

        Args:
            chunks: the student's model chunks, without wrappers.
            vocab_size: size of the vocabulary without padding; padding is never sampled.
            batch_rows: maximum number of sequences that are decoded together.
            cache_tokens: maximum size of the cache in tokens: slots times the longest prompt plus the limit. One
                sequence always fits.
            weights_version: returns the number of completed training steps.
            stop_requested: called for every token by all ranks of the model together; returns the same on each.
            fp8: see `SlotDecoder`.
        """
        self._fp8 = fp8
        self._chunks = list(chunks)
        self._vocab_size = vocab_size
        self._batch_rows = batch_rows
        self._cache_tokens = cache_tokens
        self._weights_version = weights_version
        self._stop_requested = stop_requested

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `nemo_popsd.rollout.engine.RolloutEngine`.

        Raises:
            StopRequested: the run was requested to stop; on all ranks that share these sequences. Ranks that share
                experts decode to the end first, because each needs the others for every token.
        """
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            return self._generate_with_shared_experts(requests, sampling)
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        if size == 1:
            return self._generate(requests, sampling, self._stop_requested)
        shares: list[list[Rollout] | None] = [None] * size
        try:
            share = replace(sampling, token_budget=math.ceil(sampling.token_budget / size))
            own = self._generate(requests[rank::size], share, self._stop_requested)
        except StopRequested:
            own = None
        dist.all_gather_object(shares, own, group=group)
        complete = [share for share in shares if share is not None]
        if len(complete) < size:
            raise StopRequested
        return [complete[index % size][index // size] for index in range(len(requests))]

    def _generate_with_shared_experts(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """Decodes the sequences of all ranks that share experts on each of these ranks, because their layers
        communicate.

        Ranks of the same replica have the same sequences, which are decoded once.
        """
        group = parallel_state.get_expert_model_parallel_group()
        share = parallel_state.get_data_parallel_rank()
        gathered: list[tuple[int, list[Request]]] = [(0, [])] * group.size()
        dist.all_gather_object(gathered, (share, list(requests)), group=group)
        by_share = dict(sorted(gathered, key=lambda pair: pair[0]))
        all_requests = [request for part in by_share.values() for request in part]
        all_sampling = replace(sampling, token_budget=sampling.token_budget * len(by_share))
        rollouts = self._generate(all_requests, all_sampling, lambda: False)
        begin = sum(len(part) for other, part in by_share.items() if other < share)
        return rollouts[begin : begin + len(requests)]

    def _generate(
        self, requests: Sequence[Request], sampling: SamplingParams, stop_requested: Callable[[], bool]
    ) -> list[Rollout]:
        if not requests:
            return []
        longest = max(len(request.prompt) for request in requests) + sampling.max_response_tokens
        slots = max(1, min(self._batch_rows, len(requests), self._cache_tokens // longest))
        schedule = SlotSchedule(requests, slots, prefill_tokens=PREFILL_TOKENS)
        decoder = SlotDecoder(self._chunks, slots, longest, fp8=self._fp8)
        state = _SlotState(slots, sampling.max_response_tokens, next(self._chunks[0].parameters()).device)
        with decoder.open():
            while schedule.unfinished:
                if stop_requested():
                    raise StopRequested
                if admission := schedule.admit():
                    state.enter(admission, decoder)
                width = schedule.width
                inputs, positions, uniform = state.step(width)
                logits = decoder.next_logits(inputs, positions, reach_of(schedule.longest, longest))
                chosen = self._choose(logits, sampling, uniform)
                state.advance(chosen[:, 0].long())
                sampled = chosen.tolist()  # the only point where a step waits for the device
                ended = schedule.accept([int(token) for token, _ in sampled], [value for _, value in sampled], sampling)
                if ended := ended + schedule.leave_unfinished(sampling.token_budget):
                    state.leave(ended)
                    state.move(schedule.narrow(), decoder)
        return self._rollouts(schedule.done)

    def _rollouts(self, sequences: list[DecodingSequence]) -> list[Rollout]:
        version = self._weights_version()
        rollouts = []
        for sequence in sorted(sequences, key=lambda sequence: sequence.index):
            parts: list[tuple[int, int]] = []
            if sequence.request.partial is not None:
                earlier = sequence.request.partial
                parts = [*earlier.parts, (version, len(sequence.response) - len(earlier.response))]
                parts = [part for part in parts if part[1]]
            segments = tuple(parts) if any(part_version != version for part_version, _ in parts) else ()
            rollouts.append(
                Rollout(
                    sequence.response, sequence.log_probs, sequence.truncated, version, sequence.unfinished, segments
                )
            )
        return rollouts

    def _choose(self, logits: Tensor | None, sampling: SamplingParams, uniform: Tensor) -> Tensor:
        """Tokens and their log-probabilities [B, 2] float64, the same on all ranks that decode these sequences.

        Collectives: those of `sample_tokens`; one broadcast if there are several pipeline stages; one if ranks share
        experts.
        """
        chosen = torch.empty(len(uniform), 2, dtype=torch.float64, device=uniform.device)
        if logits is not None:
            group = parallel_state.get_tensor_model_parallel_group()
            shard = VocabShard(self._vocab_size, logits.shape[1], group)
            chosen = torch.stack([x.double() for x in sample_tokens(logits, sampling, uniform, shard)], dim=1)
        for group, source in (
            (parallel_state.get_pipeline_model_parallel_group(), -1),
            (parallel_state.get_expert_model_parallel_group(), 0),
        ):
            if group.size() > 1:
                dist.broadcast(chosen, src=dist.get_global_rank(group, source % group.size()), group=group)
        return chosen


class _SlotState:
    """The per-slot state of decoding on the device."""

    def __init__(self, slots: int, limit: int, device: torch.device) -> None:
        self._limit, self._device = limit, device
        # Last token, its position, number of generated tokens, and the increment of the last two: 0 without a sequence.
        self._last, self._position, self._generated, self._advance = torch.zeros(
            4, slots, dtype=torch.long, device=device
        )
        self._uniforms = torch.zeros(slots, limit, dtype=torch.float64, device=device)

    def enter(self, admission: Admission, decoder: SlotDecoder) -> None:
        """Fills the slots of new sequences, including the keys of their prompts."""
        for group in admission.prefills:
            longest = max(sequence.position for _, sequence in group)
            padded = [(sequence.context[:-1] + [0] * longest)[:longest] for _, sequence in group]
            decoder.prefill(self._tensor([slot for slot, _ in group]), self._tensor(padded))
        for source, target, length in admission.copies:
            decoder.copy(self._tensor([source]), self._tensor([target]), length)
        slots = self._tensor([slot for slot, _ in admission.sequences])
        sequences = [sequence for _, sequence in admission.sequences]
        self._last[slots] = self._tensor([sequence.last for sequence in sequences])
        self._position[slots] = self._tensor([sequence.position for sequence in sequences])
        self._generated[slots] = self._tensor([len(sequence.response) for sequence in sequences])
        self._advance[slots] = 1
        self._uniforms[slots] = uniforms([sequence.request.seed for sequence in sequences], self._limit).to(
            self._device
        )

    def step(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and random numbers of the first `width` slots: [B] each."""
        index = self._generated[:width].clamp(max=self._limit - 1)
        uniform = self._uniforms[:width].gather(1, index[:, None]).squeeze(1)
        return self._last[:width], self._position[:width], uniform

    def advance(self, tokens: Tensor) -> None:
        """Appends the tokens [B] to the first B slots."""
        width = len(tokens)
        self._last[:width] = tokens
        for counter in (self._position, self._generated):
            counter[:width] += self._advance[:width]

    def leave(self, slots: list[int]) -> None:
        """Freezes the slots after the last position that their sequences wrote."""
        self._advance[self._tensor(slots)] = 0

    def move(self, moves: list[tuple[int, int, int]], decoder: SlotDecoder) -> None:
        """Moves sequences to other slots."""
        for source, target, length in moves:
            decoder.copy(self._tensor([source]), self._tensor([target]), length)
            for values in (self._last, self._position, self._generated, self._advance, self._uniforms):
                values[target] = values[source]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
