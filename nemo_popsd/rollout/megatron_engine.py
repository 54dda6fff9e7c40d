"""Rollouts from the training process's own model: its live weights, its tensor-parallel group, a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_popsd.errors import StopRequested
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.sampling import log_probs_of, sample, uniforms


class MegatronEngine:
    """Decodes batches of prompts together, one token at a time.

    Rows of a batch share their positions: the part of the prompts that all rows have is prefilled at once, longer
    prompts are fed token by token after that. Rows that are done leave the cache when half of them are.

    Collectives: those of the model's forward, one gather of [B, V] logits and one broadcast of [B] tokens per step
    over the tensor-parallel group; the broadcast makes ranks that rounded differently go on with the same tokens.
    """

    def __init__(
        self,
        model: GPTModel,
        *,
        vocab_size: int,
        batch_rows: int,
        cache_tokens: int,
        weights_version: Callable[[], int],
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keeps references only.

        Args:
            model: the student, bare.
            vocab_size: true vocabulary; padded entries are never drawn.
            batch_rows: most rows decoded together.
            cache_tokens: most tokens that the cache holds, unless a single row needs more.
            weights_version: number of optimizer steps behind the current weights.
            stop_requested: asked for every token, by all ranks of the model together; they are told the same.
        """
        self._model = model
        self._vocab_size = vocab_size
        self._batch_rows = batch_rows
        self._cache_tokens = cache_tokens
        self._weights_version = weights_version
        self._stop_requested = stop_requested

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `nemo_popsd.rollout.engine.RolloutEngine`. Prompts of similar length are decoded together.

        Raises:
            StopRequested: the run was asked to stop; on all ranks of the model.
        """
        if not requests:
            return []
        training = self._model.training
        self._model.eval()
        rollouts: dict[int, Rollout] = {}
        try:
            # Prompts of like length side by side: rows of a batch need little feeding beyond the common prefill.
            order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt))
            while order:
                rows = self._next_rows(order, requests, sampling)
                order = order[len(rows) :]
                decoded = self._decode([requests[row] for row in rows], sampling)
                rollouts.update(zip(rows, decoded, strict=True))
        finally:
            self._model.train(training)
        return [rollouts[row] for row in range(len(requests))]

    def _next_rows(self, order: list[int], requests: Sequence[Request], sampling: SamplingParams) -> list[int]:
        """The first rows of `order` whose cache, as long for each as for the longest, fits; at least one."""
        for count in range(1, min(self._batch_rows, len(order))):
            longest = len(requests[order[count]].prompt) + sampling.max_response_tokens
            if (count + 1) * longest > self._cache_tokens:
                return order[:count]
        return order[: self._batch_rows]

    def _decode(self, requests: list[Request], sampling: SamplingParams) -> list[Rollout]:
        batch = _Batch(requests, sampling, next(self._model.parameters()).device)
        context = StaticInferenceContext(len(requests), batch.longest)
        position = batch.shortest_prompt
        inputs = batch.tokens[:, :position]
        while True:
            if self._stop_requested():
                raise StopRequested
            logits = self._forward(inputs, context)
            position = batch.accept(logits, position, self._choose)
            if batch.all_done(position):
                return batch.rollouts(self._weights_version())
            batch.compact(context)
            inputs = batch.tokens[:, position - 1 : position]

    def _forward(self, inputs: Tensor, context: StaticInferenceContext) -> Tensor:
        """Logits [B, V] after the last of `inputs` [B, s], which are put into the cache."""
        offset, (rows, length) = context.sequence_len_offset, inputs.shape
        positions = torch.arange(offset, offset + length, device=inputs.device).expand(rows, -1)
        logits = self._model(
            input_ids=inputs.contiguous(),
            position_ids=positions,
            attention_mask=None,
            inference_context=context,
            runtime_gather_output=True,
        )
        context.sequence_len_offset += length
        context.enable_decode_mode()
        return logits[:, -1, : self._vocab_size]

    def _choose(self, logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> Tensor:
        tokens = sample(logits, sampling, uniform)
        group = self._model.pg_collection.tp
        if group.size() > 1:
            dist.broadcast(tokens, src=dist.get_global_rank(group, 0), group=group)
        return tokens


class _Batch:
    """Rows that are decoded together: their tokens so far, and which of them still run.

    Attributes:
        tokens: [B, longest] int64; prompt, then response.
        longest: length of the longest prompt plus the response limit.
        shortest_prompt: tokens that can be prefilled at once.
    """

    def __init__(self, requests: list[Request], sampling: SamplingParams, device: torch.device) -> None:
        self._sampling = sampling
        lengths = [len(request.prompt) for request in requests]
        self.longest = max(lengths) + sampling.max_response_tokens
        self.shortest_prompt = min(lengths)
        self.tokens = torch.zeros(len(requests), self.longest, dtype=torch.long, device=device)
        for row, request in enumerate(requests):
            self.tokens[row, : lengths[row]] = torch.tensor(request.prompt, device=device)
        self._prompt_lengths = torch.tensor(lengths, device=device)
        self._log_probs = torch.zeros(len(requests), self.longest, device=device)
        self._uniforms = uniforms([request.seed for request in requests], sampling.max_response_tokens).to(device)
        self._stops = torch.tensor(sorted(sampling.stop_token_ids), device=device)
        self._rows = torch.arange(len(requests), device=device)
        self._ends = torch.full((len(requests),), -1, device=device)
        self._done: dict[int, tuple[list[int], list[float], bool]] = {}
        self._size = len(requests)

    def accept(self, logits: Tensor, position: int, choose: Callable[[Tensor, SamplingParams, Tensor], Tensor]) -> int:
        """Draws the tokens at `position`; rows still in their prompt keep theirs. Returns the next position."""
        drawn = self._prompt_lengths <= position
        number = (position - self._prompt_lengths).clamp(0, self._sampling.max_response_tokens - 1)
        chosen = choose(logits, self._sampling, self._uniforms.gather(1, number[:, None]).squeeze(1))
        self.tokens[:, position] = torch.where(drawn, chosen, self.tokens[:, position])
        self._log_probs[:, position] = log_probs_of(logits, self.tokens[:, position])
        at_limit = position + 1 - self._prompt_lengths >= self._sampling.max_response_tokens
        ended = drawn & (self._ends < 0) & (torch.isin(chosen, self._stops) | at_limit)
        self._ends = torch.where(ended, position + 1, self._ends)
        return position + 1

    def all_done(self, position: int) -> bool:
        """Whether every row has ended."""
        return position >= self.longest or bool((self._ends >= 0).all())

    def compact(self, context: StaticInferenceContext) -> None:
        """Takes ended rows out of the batch and of the cache once they are half of it."""
        running = self._ends < 0
        if int(running.sum()) * 2 > len(running):
            return
        self._collect(~running)
        keep = running.nonzero().squeeze(1)
        for name in ("tokens", "_prompt_lengths", "_log_probs", "_uniforms", "_rows", "_ends"):
            setattr(self, name, getattr(self, name)[keep])
        cache = context.key_value_memory_dict
        for layer, (key, value) in cache.items():
            cache[layer] = (key[:, keep], value[:, keep])
        context.max_batch_size = len(keep)

    def rollouts(self, version: int) -> list[Rollout]:
        """All rows, in the order of the requests."""
        self._collect(torch.ones_like(self._ends, dtype=torch.bool))
        return [Rollout(*self._done[row], weights_version=version) for row in range(self._size)]

    def _collect(self, which: Tensor) -> None:
        for index in which.nonzero().squeeze(1).tolist():
            begin, end = int(self._prompt_lengths[index]), int(self._ends[index])
            response = self.tokens[index, begin:end].tolist()
            cut = response[-1] not in self._sampling.stop_token_ids
            self._done[int(self._rows[index])] = (response, self._log_probs[index, begin:end].tolist(), cut)
