"""Holders and owners of response tokens, and routes of states and gradients, against unsplit sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemo_popsd.megatron.microbatches import ContextSequence, microbatches
from nemo_popsd.megatron.response_routing import UNSPLIT, SequenceSplit, gather_response_states
from tests.harness import run_ranks

CASES = {
    "mixed": [(4, 6), (1, 1), (9, 12), (3, 0), (7, 1), (2, 5)],
    "one-token responses": [(5, 1), (1, 1), (8, 1), (2, 1), (3, 1)],
    "one row": [(3, 2)],
    "nothing to learn": [(3, 0), (1, 0)],
}
"""Prompt and response tokens of each sequence."""
SIZES = {"cp2": (2, 1), "sp2": (1, 2), "cp2 sp2": (2, 2)}
"""Context-parallel ranks, slices of each."""
HIDDEN = 3


def _fake(size: int, rank: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank) if size > 1 else None


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 5))
def test_each_token_has_one_owner_whatever_its_context_and_shares_are_even(response: list[int], size: int) -> None:
    splits = [SequenceSplit(context=_fake(size, rank)) for rank in range(size)]
    shares = [list(range(len(response)))[split.owned(response)] for split in splits]
    assert sorted(index for share in shares for index in share) == list(range(len(response)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    owners = splits[0].owners(response).tolist()
    assert [owners[index] for share in shares for index in share] == [r for r in range(size) for _ in shares[r]]


def test_one_token_responses_do_not_all_go_to_one_rank() -> None:
    split = SequenceSplit(context=_fake(4, 0))
    assert {int(split.owners([token])[0]) for token in range(100)} == {0, 1, 2, 3}


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([(2, 1), (3, 1), (2, 2), (4, 3), (1, 2)]),
)
def test_ranks_hold_each_position_once_and_lengths_divide(blocks: list[int], sizes: tuple[int, int]) -> None:
    contexts, slices = sizes
    split = SequenceSplit(context=_fake(contexts, 0), tensor=_fake(slices, 0))
    lengths = [block * split.sequence_multiple for block in blocks]
    held = torch.cat([split.held_places(lengths, rank) for rank in range(contexts)])
    assert sorted(held.tolist()) == list(range(sum(lengths)))
    assert split.total_multiple % split.sequence_multiple == 0
    assert split.total_multiple // contexts % slices == 0


def _route(rank: int, world_size: int, contexts: int, slices: int) -> dict[str, list[dict[str, Any]]]:
    """Each case padded and packed: states of the tokens that this rank owns, gradients of those that it holds."""
    import torch.distributed as dist

    tensor_groups = [dist.new_group([c * slices + t for t in range(slices)]) for c in range(contexts)]
    context_groups = [dist.new_group([c * slices + t for c in range(contexts)]) for t in range(slices)]
    split = SequenceSplit(
        context=context_groups[rank % slices] if contexts > 1 else None,
        tensor=tensor_groups[rank // slices] if slices > 1 else None,
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for name, lengths in CASES.items():
        ids = iter(range(1, 10_000))
        sequences = [ContextSequence([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in lengths]
        for packed in (False, True):
            seen = results[f"{name}, {'packed' if packed else 'padded'}"] = []
            for batch in microbatches(sequences, 40, torch.device("cpu"), split=split, packed=packed):
                # A token's state is H multiples of its id; each slice holds its part of the input.
                local = batch.input_ids.t().chunk(slices)[split.tensor_rank].double()
                states = torch.stack([local * (number + 1) for number in range(HIDDEN)], dim=-1).requires_grad_()
                owned = gather_response_states(states, batch.route, split)
                # A gradient that depends only on the token and is the same on every slice, as the loss returns it.
                owned.backward(1.0 / (1.0 + owned.detach()))
                responses = [sequences[row].response[split.owned(sequences[row].response)] for row in batch.sequences]
                seen.append({"owned": owned.detach(), "responses": responses, "states": states.detach()})
                seen[-1] |= {"gradient": states.grad, "lengths": batch.response_lengths, "width": batch.shape[1]}
    return results


@pytest.fixture(scope="module")
def routed() -> dict[str, list[dict[str, Any]]]:
    return {name: run_ranks(_route, sizes[0] * sizes[1], *sizes) for name, sizes in SIZES.items()}


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", SIZES)
def test_owners_get_the_states_that_predict_their_tokens(routed: Any, layout: str, case: str, form: str) -> None:
    _, slices = SIZES[layout]
    seen: list[int] = []
    for rank, results in enumerate(routed[layout]):
        for batch in results[f"{case}, {form}"]:
            tokens = [token for response in batch["responses"] for token in response]
            assert batch["lengths"] == [len(response) for response in batch["responses"]]
            expected = torch.tensor([float(token - 1) for token in tokens], dtype=torch.float64)  # the id before it
            for number in range(HIDDEN):
                assert torch.equal(batch["owned"][:, number], expected * (number + 1))
            seen += tokens if rank % slices == 0 else []
    ids = [p + r for p, r in CASES[case]]
    responses = [sum(ids[:n]) + p + 1 + i for n, (p, r) in enumerate(CASES[case]) for i in range(r)]
    assert sorted(seen) == responses


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", SIZES)
def test_each_gradient_returns_once_to_the_rank_of_its_state(routed: Any, layout: str, case: str, form: str) -> None:
    ids = [p + r for p, r in CASES[case]]
    predicting = {sum(ids[:n]) + p + i for n, (p, r) in enumerate(CASES[case]) for i in range(r)}
    total = 0
    for results in routed[layout]:
        for batch in results[f"{case}, {form}"]:
            states, gradient = batch["states"], batch["gradient"]
            learns = torch.isin(states[..., 0], torch.tensor(sorted(predicting), dtype=torch.float64))
            expected = torch.where(learns[..., None], 1.0 / (1.0 + states), 0.0)
            assert torch.equal(gradient, expected)
            total += int(learns.sum())
    assert total == len(predicting)


def test_without_a_split_no_state_is_exchanged() -> None:
    [batch] = microbatches([ContextSequence([7, 8], [9, 4]), ContextSequence([5], [6])], 100, torch.device("cpu"))
    states: Tensor = batch.input_ids.t()[..., None].double()
    assert gather_response_states(states, batch.route, UNSPLIT).squeeze(1).tolist() == [8.0, 9.0, 5.0]
