"""Sequences in slots, simulated on a cache of tokens: each sequence always finds its own tokens in its slot."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.megatron_engine import _SlotState
from nemo_popsd.rollout.sampling import uniforms
from nemo_popsd.rollout.scheduler import SlotSchedule, reach_of

STOP = 0


class TokenCache:
    """A cache whose keys are the tokens themselves, written and copied as the decoder does."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.content = torch.full((slots, capacity), -1)
        self.prefilled: list[list[int]] = []

    def prefill(self, slots: torch.Tensor, inputs: torch.Tensor) -> None:
        self.content[slots, : inputs.shape[1]] = inputs
        self.prefilled += [row.tolist() for row in inputs]

    def step(self, inputs: torch.Tensor, positions: torch.Tensor) -> None:
        self.content[torch.arange(len(inputs)), positions] = inputs

    def copy(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        self.content[target, :length] = self.content[source, :length]


def response_of(request: Request, limit: int) -> list[int]:
    """The response of the "model": a function of the request."""
    generator = random.Random(request.seed)
    length = generator.randint(1, limit + 3)
    return [*(generator.randint(1, 9) for _ in range(length)), STOP][:limit]


def simulate(
    requests: Sequence[Request], slots: int, limit: int, prefill_tokens: int = 40, budget: int = 0
) -> tuple[Any, TokenCache, int]:
    """The engine's loop on `TokenCache`; the schedule, the cache and the number of steps."""
    sampling = SamplingParams(1.0, 1.0, 0, limit, frozenset({STOP}))
    schedule = SlotSchedule(requests, slots, prefill_tokens=prefill_tokens)
    capacity = max(len(request.prompt) for request in requests) + limit
    cache, state, steps = TokenCache(slots, capacity), _SlotState(slots, limit, torch.device("cpu")), 0
    numbers = {request.seed: uniforms([request.seed], limit)[0] for request in requests}
    while schedule.unfinished:
        if admission := schedule.admit():
            assert all(
                len(group) == 1 or len(group) * max(row.position for _, row in group) <= prefill_tokens
                for group in admission.prefills
            )
            state.enter(admission, cast(Any, cache))
        inputs, positions, uniform = state.step(schedule.width)
        cache.step(inputs, positions)
        tokens = torch.full((schedule.width,), 5)
        for slot, row in schedule.live:
            assert slot < schedule.width
            context = [*row.request.prompt, *row.response]
            assert cache.content[slot, : len(context)].tolist() == context
            assert (int(inputs[slot]), int(positions[slot])) == (context[-1], len(context) - 1)
            assert uniform[slot] == numbers[row.request.seed][len(row.response)]
            tokens[slot] = response_of(row.request, limit)[len(row.response)]
        state.advance(tokens)
        ended = schedule.accept(tokens.tolist(), [-float(token) for token in tokens], sampling)
        if ended := ended + schedule.leave_unfinished(budget):
            state.leave(ended)
            state.move(schedule.narrow(), cast(Any, cache))
        steps += 1
    return schedule, cache, steps


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=30),
    slots=st.integers(1, 20),
    limit=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_every_request_is_answered_once_from_its_own_keys(
    prompts: list[list[int]], slots: int, limit: int, seed: int
) -> None:
    requests = [Request(prompt, seed=seed * 100 + number) for number, prompt in enumerate(prompts)]
    schedule, cache, _ = simulate(requests, slots, limit)
    by_number = sorted(schedule.done, key=lambda row: row.index)
    assert [row.index for row in by_number] == list(range(len(requests)))
    for row, request in zip(by_number, requests, strict=True):
        assert row.response == response_of(request, limit)
        assert row.log_probs == [-float(token) for token in row.response]
        assert row.truncated == (row.response[-1] != STOP)
    distinct = {tuple(prompt) for prompt in prompts if len(prompt) > 1}
    assert len(cache.prefilled) == len(distinct), "a prompt was computed twice"


def test_requests_that_run_to_their_end_come_first_then_partial_ones() -> None:
    partial = Rollout([4, 4], [-1.0, -1.0], False, 0, unfinished=True)
    requests = [
        Request([1], 0),
        Request([1, 2, 3], 1, partial),
        Request([2], 2),
        Request([3, 2, 1], 3, partial, run_to_end=True),
    ]
    schedule = SlotSchedule(requests, 3, prefill_tokens=100)
    admission = schedule.admit()
    assert admission is not None
    assert [row.index for _, row in admission.sequences] == [3, 1, 0]
    assert [row.response for _, row in admission.sequences] == [[4, 4], [4, 4], []]


def test_waiting_sequences_take_the_slots_of_those_that_end() -> None:
    """Far fewer steps than with batches that wait for their longest sequence."""
    requests = [Request([1 + number % 9, 2, 3], seed=number) for number in range(200)]
    lengths = [len(response_of(request, 40)) for request in requests]
    _, _, steps = simulate(requests, 16, 40)
    in_batches = sum(max(lengths[begin : begin + 16]) for begin in range(0, len(lengths), 16))
    assert steps < 1.25 * sum(lengths) / 16 + 40
    assert steps < 0.75 * in_batches


def test_a_step_is_no_wider_than_the_remaining_sequences_need() -> None:
    requests = [Request([1, 2], seed=number) for number in range(64)]
    schedule = SlotSchedule(requests, 64, prefill_tokens=1000)
    schedule.admit()
    sampling = SamplingParams(1.0, 1.0, 0, 1000, frozenset({STOP}))
    widths = []
    for slot in [*range(0, 64, 2), *range(1, 64, 2)]:
        at = next(place for place, row in schedule.live if row.index == slot)
        tokens = [STOP if place == at else 5 for place in range(schedule.width)]
        schedule.accept(tokens, [0.0] * len(tokens), sampling)
        schedule.narrow()
        if schedule.live:
            assert all(place < schedule.width for place, _ in schedule.live)
            widths.append((len(schedule.live), schedule.width))
    assert {width for _, width in widths} == {64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1}
    assert all(width < 2 * live or width <= live + 8 for live, width in widths)


def test_attention_reads_one_of_a_few_lengths() -> None:
    reaches = {reach_of(longest, 100_000) for longest in range(1, 40_000)}
    assert len(reaches) < 75
    for longest in (1, 64, 65, 511, 512, 5000, 39_999):
        assert longest <= reach_of(longest, 100_000) <= max(longest + 31, 1.125 * longest + 1)
    assert reach_of(70, 90) == 90
    assert reach_of(60, 90) == 64


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=20),
    slots=st.integers(1, 12),
    limit=st.integers(1, 12),
    budget=st.integers(1, 60),
    patience=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_budget_leaves_responses_that_later_calls_finish(
    prompts: list[list[int]], slots: int, limit: int, budget: int, patience: int, seed: int
) -> None:
    """Each call has new requests and those left unfinished before. Every response is the same as if generated alone."""
    times_left: Counter[int] = Counter()
    waiting = [Request(prompt, seed=seed * 100 + number) for number, prompt in enumerate(prompts)]
    ended: dict[int, list[int]] = {}
    partial: list[Request] = []
    while waiting or partial:
        fresh, waiting = waiting[:5], waiting[5:]
        requests = [*partial, *fresh]
        schedule, _, _ = simulate(requests, slots, limit, budget=budget)
        rows = sorted(schedule.done, key=lambda row: row.index)
        assert [row.index for row in rows] == list(range(len(requests)))
        assert any(not row.unfinished for row in rows)
        generated = sum(
            len(row.response) - len(q.partial.response if q.partial else [])
            for row, q in zip(rows, requests, strict=True)
        )
        assert schedule.generated == generated
        if not partial and sum(not row.unfinished for row in rows) > 1:
            assert generated <= budget + limit * slots  # up to the end of the first response
        for row in rows:
            if row.request.run_to_end:
                assert not row.unfinished
            if not row.unfinished:
                ended[row.request.seed] = row.response
        left = [row for row in rows if row.unfinished]
        times_left.update(row.request.seed for row in left)
        partial = [
            replace(
                row.request,
                partial=Rollout(row.response, row.log_probs, False, 0, unfinished=True),
                run_to_end=times_left[row.request.seed] >= patience,
            )
            for row in left
        ]
    assert max(times_left.values(), default=0) <= patience
    assert len(ended) == len(prompts)
    assert all(response == response_of(Request(prompts[key % 100], key), limit) for key, response in ended.items())
