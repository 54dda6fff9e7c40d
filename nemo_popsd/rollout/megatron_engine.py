"""Rollouts from the training process's own model: its live weights, its layout, a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_popsd.megatron.decoding import cached_logits, whole_sequences
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.sampling import log_probs_of, sample, uniforms


class MegatronEngine:
    """Decodes batches of prompts together, one token at a time.

    Rows of a batch share their positions: the part of the prompts that all rows have is prefilled at once, longer
    prompts are fed token by token after that. Rows that are done leave the cache when half of them are.

    Tensor parallelism: each step gathers [B, V] logits over the group. Sequence parallelism is off while decoding.
    Context-parallel ranks share the rows out among them and exchange the responses at the end (one gather of objects).
    Pipeline stages pass each token on and wait for each other: decoding takes as long as on one stage. Ranks that share
    experts decode the rows of all of them, so that each step of one is a step of all.

    After each step the ranks of one model get the drawn tokens from one of them (a broadcast of [B, 2] float64 over the
    tensor-parallel and the pipeline group), so that ranks that rounded differently go on with the same tokens.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        *,
        vocab_size: int,
        batch_rows: int,
        cache_tokens: int,
        weights_version: Callable[[], int],
    ) -> None:
        """Keeps references only.

        Args:
            chunks: the student's, bare.
            vocab_size: true vocabulary; padded entries are never drawn.
            batch_rows: most rows decoded together.
            cache_tokens: most tokens that the cache holds, unless a single row needs more.
            weights_version: number of optimizer steps behind the current weights.
        """
        self._chunks = list(chunks)
        self._vocab_size = vocab_size
        self._batch_rows = batch_rows
        self._cache_tokens = cache_tokens
        self._weights_version = weights_version

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `nemo_popsd.rollout.engine.RolloutEngine`. Prompts of similar length are decoded together."""
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            return self._generate_in_step(requests, sampling)
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        mine = self._generate(requests[rank::size], sampling)
        if size == 1:
            return mine
        shares: list[list[Rollout]] = [[]] * size
        dist.all_gather_object(shares, mine, group=group)
        return [shares[row % size][row // size] for row in range(len(requests))]

    def _generate_in_step(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """Decodes the rows of all ranks that share experts, on each of them: a layer of one needs those of the others.

        Ranks that share more than experts have the same rows, which are decoded once.
        """
        group = parallel_state.get_expert_model_parallel_group()
        share = parallel_state.get_data_parallel_rank()
        gathered: list[tuple[int, list[Request]]] = [(0, [])] * group.size()
        dist.all_gather_object(gathered, (share, list(requests)), group=group)
        by_share = dict(sorted(gathered, key=lambda pair: pair[0]))
        together = self._generate([request for part in by_share.values() for request in part], sampling)
        begin = sum(len(part) for other, part in by_share.items() if other < share)
        return together[begin : begin + len(requests)]

    def _generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        with whole_sequences(self._chunks):
            # Prompts of like length side by side: rows of a batch need little feeding beyond the common prefill.
            order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt))
            while order:
                rows = self._next_rows(order, requests, sampling)
                order = order[len(rows) :]
                decoded = self._decode([requests[row] for row in rows], sampling)
                rollouts.update(zip(rows, decoded, strict=True))
        return [rollouts[row] for row in range(len(requests))]

    def _next_rows(self, order: list[int], requests: Sequence[Request], sampling: SamplingParams) -> list[int]:
        """The first rows of `order` whose cache, as long for each as for the longest, fits; at least one."""
        for count in range(1, min(self._batch_rows, len(order))):
            longest = len(requests[order[count]].prompt) + sampling.max_response_tokens
            if (count + 1) * longest > self._cache_tokens:
                return order[:count]
        return order[: self._batch_rows]

    def _decode(self, requests: list[Request], sampling: SamplingParams) -> list[Rollout]:
        batch = _Batch(requests, sampling, next(self._chunks[0].parameters()).device)
        context = StaticInferenceContext(len(requests), batch.longest)
        position = batch.shortest_prompt
        inputs = batch.tokens[:, :position]
        while True:
            logits = cached_logits(self._chunks, inputs, context)
            position = batch.accept(logits, position, self._choose)
            if batch.all_done(position):
                return batch.rollouts(self._weights_version())
            batch.compact(context)
            inputs = batch.tokens[:, position - 1 : position]

    def _choose(
        self, logits: Tensor | None, sampling: SamplingParams, uniform: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B] int64 and their log-probabilities [B]; `given` tokens (not negative) stay what they are."""
        chosen = torch.empty(len(uniform), 2, dtype=torch.float64, device=uniform.device)
        if logits is not None:
            logits = logits[:, : self._vocab_size]
            tokens = torch.where(given < 0, sample(logits, sampling, uniform), given)
            chosen = torch.stack([tokens.double(), log_probs_of(logits, tokens).double()], dim=1)
        for group, source in (
            (parallel_state.get_tensor_model_parallel_group(), 0),
            (parallel_state.get_pipeline_model_parallel_group(), -1),
        ):
            if group.size() > 1:
                dist.broadcast(chosen, src=dist.get_global_rank(group, source % group.size()), group=group)
        return chosen[:, 0].long(), chosen[:, 1].float()


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

    def accept(self, logits: Tensor | None, position: int, choose: Callable[..., tuple[Tensor, Tensor]]) -> int:
        """Draws the tokens at `position`; rows still in their prompt keep theirs. Returns the next position."""
        drawn = self._prompt_lengths <= position
        number = (position - self._prompt_lengths).clamp(0, self._sampling.max_response_tokens - 1)
        uniform = self._uniforms.gather(1, number[:, None]).squeeze(1)
        given = torch.where(drawn, -1, self.tokens[:, position])
        chosen, self._log_probs[:, position] = choose(logits, self._sampling, uniform, given)
        self.tokens[:, position] = chosen
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
