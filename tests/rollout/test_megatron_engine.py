"""The engine against transformers, against the training forward, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from tests.harness import run_ranks
from tests.tiny_models import load_dense, save_tiny_model

pytestmark = pytest.mark.slow

LIMIT = 24
PROMPTS = [[11, 150, 7], [42], [3, 3, 9, 100, 77, 61, 180], [90, 14, 4, 55], [42, 8], [5, 6, 7, 8, 9]]
"""Lengths 1 to 7, not in order."""
REQUESTS = [Request(prompt, seed=100 + number) for number, prompt in enumerate(PROMPTS)]
GREEDY = SamplingParams(0.0, 1.0, 0, LIMIT, frozenset())
RANDOM = SamplingParams(1.1, 0.95, 50, LIMIT, frozenset(range(0, 203, 14)))  # one token in fourteen stops
TOP_P = SamplingParams(1.2, 0.9, 0, LIMIT, RANDOM.stop_token_ids)
REPEATED = [Request(PROMPTS[number % 3], seed=500 + number) for number in range(15)]
"""Three prompts, five seeds each."""
BUDGET = 50
PLANTED = 1000.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[list[int]]:
    """The tokens that transformers generates without stop tokens."""
    dense = load_dense(model)
    return [
        dense.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="module")
def stops(greedy: list[list[int]]) -> frozenset[int]:
    """Tokens that end three of the greedy responses early, at different places, and leave one to run to its limit."""
    chosen = frozenset({greedy[0][0], greedy[2][5], greedy[4][11]})
    ends = [next((n for n, token in enumerate(r) if token in chosen), LIMIT) for r in greedy]
    assert len(set(ends)) > 2
    return chosen


def observe(rank: int, world_size: int, model: Path, stops: frozenset[int]) -> dict[str, Any]:
    """Everything that the tests check, generated in one start of the ranks."""
    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.megatron.forward import frozen_hidden_states, output_weight, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence
    from nemo_popsd.rollout.megatron_engine import MegatronEngine
    from tests.tiny_models import build_student

    student = build_student(model, tensor=world_size)
    version = [0]

    def engine(batch_rows: int = 64, cache_tokens: int = 1 << 20) -> MegatronEngine:
        return MegatronEngine(
            student.chunks,
            vocab_size=student.vocab_size,
            batch_rows=batch_rows,
            cache_tokens=cache_tokens,
            weights_version=lambda: version[0],
        )

    prefilled: list[list[int]] = []

    def record_prefill(decoder: Any, slots: torch.Tensor, inputs: torch.Tensor) -> None:
        prefilled.extend(inputs.tolist())
        prefill(decoder, slots, inputs)

    prefill = SlotDecoder.prefill
    SlotDecoder.prefill = record_prefill  # type: ignore[method-assign]
    with torch.no_grad():  # output vectors of the padding that would always be sampled
        first = rank * student.weight.shape[0]
        student.weight[max(0, student.vocab_size - first) :] = PLANTED
    student.gpt.train()
    seen: dict[str, Any] = {
        "greedy": engine().generate(REQUESTS, GREEDY),
        "stopped": engine().generate(REQUESTS, replace(GREEDY, stop_token_ids=stops)),
        "random": engine().generate(REQUESTS, RANDOM),
        "top-p": engine().generate(REQUESTS, TOP_P),
        "top-p, two rows": engine(2).generate(REQUESTS, TOP_P),
        "one by one": engine(1).generate(REQUESTS, RANDOM),
        "three rows": engine(3).generate(REQUESTS[::-1], RANDOM)[::-1],
        "alone": [engine().generate([request], RANDOM)[0] for request in REQUESTS],
        "small cache": engine(cache_tokens=2 * (max(len(r.prompt) for r in REQUESTS) + 20)).generate(REQUESTS, RANDOM),
        "none": engine().generate([], RANDOM),
        "one token": engine().generate(REQUESTS, replace(RANDOM, max_response_tokens=1)),
        "trains again": student.gpt.training,
    }
    budgeted = replace(RANDOM, token_budget=BUDGET)
    for name, rows in (("left", 64), ("left, two rows", 2)):
        seen[name] = engine(rows).generate(REQUESTS, budgeted)
        version[0] = 1
        rest = [
            replace(q, partial=r, run_to_end=True) for q, r in zip(REQUESTS, seen[name], strict=True) if r.unfinished
        ]
        others = [Request([9, 9], seed=7), Request([8] * 5, seed=8), Request([4], seed=9)]
        seen[f"{name}, then"] = engine(rows).generate([*others, *rest], replace(budgeted, token_budget=1))
        version[0] = 0
    for name, rows in (("repeated", 64), ("repeated, four rows", 4), ("repeated, one row", 1)):
        prefilled.clear()
        seen[name] = engine(rows).generate(REPEATED[::-1], RANDOM)[::-1]
        seen[f"prefilled, {name}"] = sorted(prefilled)
    seen["repeated alone"] = [engine().generate([request], RANDOM)[0] for request in REPEATED]
    sequences = [ContextSequence(q.prompt, r.response) for q, r in zip(REQUESTS, seen["random"], strict=True)]
    batches = student_batches(student.chunks, sequences, 1000, packed=False)
    hidden = frozen_hidden_states(student.chunks, batches)
    shards = [torch.empty_like(student.weight) for _ in range(world_size)]
    torch.distributed.all_gather(shards, output_weight(student.gpt).detach().contiguous(), group=student.tp_group)
    logits = [h @ torch.cat(shards)[: student.vocab_size].t() for h in hidden]
    seen["training forward"] = [torch.log_softmax(x, -1) for x in logits]
    with torch.no_grad():
        student.weight.neg_()
    version[0] = 7
    seen["other weights"] = engine().generate(REQUESTS, GREEDY)
    return seen


@pytest.fixture(scope="module")
def one(model: Path, stops: frozenset[int]) -> dict[str, Any]:
    return run_ranks(observe, 1, model, stops)[0]


@pytest.fixture(scope="module")
def two(model: Path, stops: frozenset[int]) -> list[dict[str, Any]]:
    return run_ranks(observe, 2, model, stops)


def responses(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.response for rollout in rollouts]


def until(response: list[int], stops: frozenset[int]) -> list[int]:
    end = next((number for number, token in enumerate(response) if token in stops), len(response))
    return response[: end + 1]


def test_greedy_tokens_are_those_of_transformers(one: dict[str, Any], greedy: list[list[int]]) -> None:
    assert responses(one["greedy"]) == greedy
    assert all(rollout.truncated and len(rollout.response) == LIMIT for rollout in one["greedy"])


def test_a_stop_token_ends_a_response_and_is_in_it_once(
    one: dict[str, Any], greedy: list[list[int]], stops: frozenset[int]
) -> None:
    """Sequences end at very different steps, so the batch shrinks."""
    assert responses(one["stopped"]) == [until(response, stops) for response in greedy]
    for rollout in one["stopped"]:
        assert rollout.truncated == (rollout.response[-1] not in stops)
        assert not stops & set(rollout.response[:-1])


def test_log_probabilities_agree_with_the_training_forward(one: dict[str, Any]) -> None:
    for name in ("random", "one by one", "three rows", "alone"):
        for rollout, expected in zip(one[name], one["training forward"], strict=True):
            log_probs = expected[torch.arange(len(rollout.response)), torch.tensor(rollout.response)]
            torch.testing.assert_close(torch.tensor(rollout.log_probs), log_probs, atol=1e-5, rtol=0)


def test_log_probabilities_agree_with_transformers(one: dict[str, Any], model: Path) -> None:
    dense = load_dense(model, torch.float64)
    for request, rollout in zip(REQUESTS, one["random"], strict=True):
        ids, start = [*request.prompt, *rollout.response], len(request.prompt) - 1
        log_probs = torch.log_softmax(dense(torch.tensor([ids])).logits[0], -1)
        expected = [float(log_probs[start + number, token]) for number, token in enumerate(rollout.response)]
        assert rollout.log_probs == pytest.approx(expected, abs=1e-5)


def test_a_response_does_not_depend_on_its_batch(one: dict[str, Any]) -> None:
    lengths = {len(response) for response in responses(one["random"])}
    assert len(lengths) > 3  # sequences leave the batch at different steps
    for name in ("one by one", "three rows", "alone", "small cache"):
        assert responses(one[name]) == responses(one["random"]), name
        assert [r.truncated for r in one[name]] == [r.truncated for r in one["random"]]
    assert responses(one["top-p, two rows"]) == responses(one["top-p"]) != responses(one["random"])


def test_requests_with_the_same_prompt_share_its_prefill(one: dict[str, Any]) -> None:
    """Each of the three prompts is computed once, except for its last token, however many slots there are."""
    alone = responses(one["repeated alone"])
    assert len({tuple(response) for response in alone}) == len(REPEATED)
    for name in ("repeated", "repeated, four rows", "repeated, one row"):
        assert responses(one[name]) == alone, name
        tokens = [token for prompt in one[f"prefilled, {name}"] for token in prompt]
        assert len(one[f"prefilled, {name}"]) == sum(len(prompt) > 1 for prompt in PROMPTS[:3])
        assert set(tokens) <= {token for prompt in PROMPTS[:3] for token in prompt[:-1]} | {0}


@pytest.mark.parametrize("name", ["left", "left, two rows"])
def test_responses_that_a_budget_left_unfinished_continue_identically(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    """With the same weights the two parts equal the response of a single call; the second call finishes the first."""
    whole, left = one["random"], one[name]
    unfinished = [number for number, rollout in enumerate(left) if rollout.unfinished]
    assert 0 < len(unfinished) < len(left)
    assert 0 < sum(len(rollout.response) for rollout in left) <= BUDGET
    for rollout, expected in zip(left, whole, strict=True):
        assert rollout.response == expected.response[: len(rollout.response)]
        assert rollout.unfinished == (len(rollout.response) < len(expected.response))
        assert rollout.segments == ()
    then = one[f"{name}, then"]
    for number, rollout in zip(unfinished, then[3:], strict=True):
        assert not rollout.unfinished
        assert (rollout.response, rollout.truncated) == (whole[number].response, whole[number].truncated)
        assert rollout.log_probs == pytest.approx(whole[number].log_probs, abs=1e-5)
        before = len(left[number].response)
        assert rollout.parts == (
            ((0, before), (1, len(rollout.response) - before)) if before else ((1, len(rollout.response)),)
        )
        assert rollout.weights_version == 1
    assert any(rollout.segments for rollout in then)
    assert any(rollout.unfinished for rollout in then[:3])  # the budget was used up
    for seen in two:
        assert responses(seen[name]) == responses(left)
        assert responses(seen[f"{name}, then"]) == responses(then)


def test_seeds_determine_the_responses(one: dict[str, Any]) -> None:
    assert responses(one["random"]) != [until(r, RANDOM.stop_token_ids) for r in responses(one["greedy"])]


def test_padded_entries_are_never_sampled(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Their output vectors are large; the other tests show that nothing else changed."""
    for seen in (one, *two):
        for name in ("greedy", "random", "top-p", "one token", "other weights"):
            assert all(token < 203 for response in responses(seen[name]) for token in response)


def test_no_requests_and_one_token(one: dict[str, Any]) -> None:
    assert one["none"] == []
    assert responses(one["one token"]) == [response[:1] for response in responses(one["random"])]
    assert all(r.truncated == (r.response[0] not in RANDOM.stop_token_ids) for r in one["one token"])


def test_weights_are_live_and_their_version_is_recorded(one: dict[str, Any]) -> None:
    assert responses(one["other weights"]) != responses(one["greedy"])
    assert {r.weights_version for r in one["random"]} == {0}
    assert {r.weights_version for r in one["other weights"]} == {7}
    assert one["trains again"]


def test_two_ranks_generate_the_same_as_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for seen in two:
        for name in (
            "greedy",
            "stopped",
            "random",
            "top-p",
            "three rows",
            "repeated, four rows",
            "one token",
            "other weights",
        ):
            assert responses(seen[name]) == responses(one[name]), name
        for rollout, expected in zip(seen["random"], one["random"], strict=True):
            assert rollout.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
