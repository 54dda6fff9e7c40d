"""Padding, grouping and response positions against a loop."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_popsd.megatron.microbatches import (
    ContextSequence,
    TokenCount,
    group_by_length,
    microbatches,
    pack_by_length,
)
from nemo_popsd.megatron.response_routing import SequenceSplit

CPU = torch.device("cpu")
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=12)


def _sequences(lengths: list[tuple[int, int]]) -> list[ContextSequence]:
    """Token ids that are all different, so that each position identifies its token."""
    ids = iter(range(1, 10_000))
    return [ContextSequence([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in lengths]


@given(LENGTHS, st.integers(1, 60))
def test_every_response_token_is_predicted_from_the_token_before_it(lengths, budget):
    sequences = _sequences(lengths)
    seen = []
    for batch in microbatches(sequences, budget, CPU):
        rows, longest = batch.input_ids.shape
        seen += batch.sequences
        assert batch.response_lengths == [len(sequences[row].response) for row in batch.sequences]
        assert batch.position_ids.tolist() == [list(range(longest))] * rows
        # Hidden states are [s, b, H]; the token at each flattened place.
        place = batch.input_ids.T.flatten().tolist()
        expected = []
        for row in batch.sequences:
            tokens = [*sequences[row].prompt, *sequences[row].response]
            expected += [tokens[tokens.index(token) - 1] for token in sequences[row].response]
        assert [place[index] for index in batch.route.take.tolist()] == expected
        for column, row in enumerate(batch.sequences):
            tokens = [*sequences[row].prompt, *sequences[row].response]
            assert batch.input_ids[column].tolist() == tokens + [0] * (longest - len(tokens))
        assert batch.padding == place.count(0)
    assert sorted(seen) == list(range(len(sequences)))


@given(LENGTHS, st.integers(1, 60))
def test_a_padded_group_is_within_the_budget_unless_it_is_one_sequence(lengths, budget):
    sizes = [p + r for p, r in lengths]
    groups = group_by_length(sizes, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(sizes[index] for index in group) <= budget
    order = [sizes[index] for group in groups for index in group]
    assert order == sorted(order, reverse=True)
    # No two neighbours could have been one group.
    for first, _ in pairwise(groups):
        assert (len(first) + 1) * max(sizes[index] for index in first) > budget


def test_groups_of_an_example():
    assert group_by_length([3, 9, 3, 4, 9], 18) == [[1, 4], [3, 0, 2]]
    assert group_by_length([5, 5, 5], 4) == [[0], [1], [2]]
    assert group_by_length([], 4) == []


def test_one_token_and_empty_responses():
    [batch] = microbatches([ContextSequence([7], [8]), ContextSequence([5, 6], [])], 10, CPU)
    assert batch.input_ids.tolist() == [[7, 8], [5, 6]]
    assert batch.route.take.tolist() == [0]
    assert batch.response_lengths == [1, 0]
    [empty] = microbatches([ContextSequence([5, 6], [])], 10, CPU)
    assert empty.route.take.tolist() == []
    assert empty.route.take.dtype == torch.long


@given(LENGTHS, st.integers(1, 60))
def test_packed_sequences_follow_each_other_within_their_bounds(lengths, budget):
    sequences = _sequences(lengths)
    seen = []
    for batch in microbatches(sequences, budget, CPU, packed=True):
        seen += batch.sequences
        tokens = [[*sequences[row].prompt, *sequences[row].response] for row in batch.sequences]
        alone = tokens[0] if sum(map(len, tokens)) == 1 else None
        if alone is not None:  # a forward has at least two tokens
            alone.append(0)
        assert batch.input_ids.tolist() == [[token for row in tokens for token in row]]
        assert batch.position_ids.tolist() == [[place for row in tokens for place in range(len(row))]]
        bounds = [0, *accumulate(map(len, tokens))]
        assert batch.packed.qkv_format == "thd"
        assert batch.packed.cu_seqlens_q.tolist() == batch.packed.cu_seqlens_kv.tolist() == bounds
        assert batch.packed.max_seqlen_q == batch.packed.max_seqlen_kv == max(map(len, tokens))
        responses = [token for row in batch.sequences for token in sequences[row].response]
        assert [batch.input_ids[0, place] for place in batch.route.take] == [token - 1 for token in responses]
        assert batch.padding == (alone is not None)
        assert batch.shape == (bounds[-1], 1)
        assert len(batch.sequences) == 1 or bounds[-1] <= budget
    assert sorted(seen) == list(range(len(sequences)))


def test_packed_groups_of_an_example():
    assert pack_by_length([3, 9, 3, 4, 9], 18) == [[1, 4], [3, 0, 2]]
    assert pack_by_length([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert pack_by_length([12, 2], 10) == [[0], [1]]
    assert pack_by_length([], 4) == []


@given(LENGTHS, st.integers(1, 60), st.booleans(), st.integers(1, 3), st.integers(0, 5))
def test_batches_have_one_shape_and_the_number_that_a_schedule_needs(lengths, budget, packed, multiple, least):
    sequences = _sequences(lengths)
    batches = microbatches(
        sequences, budget, CPU, packed=packed, one_shape=True, count_multiple=multiple, at_least=least
    )
    assert len({batch.shape for batch in batches}) == 1
    assert len({batch.input_ids.shape for batch in batches}) == 1
    assert len(batches) % multiple == 0
    assert len(batches) >= least
    assert sorted(row for batch in batches for row in batch.sequences) == list(range(len(sequences)))
    real = sum(p + r for p, r in lengths)
    assert TokenCount.of(batches).real == real
    assert TokenCount.of(batches).padding == sum(batch.input_ids.numel() for batch in batches) - real


def test_a_rank_without_sequences_has_an_empty_batch():
    for packed in (False, True):
        assert microbatches([], 10, CPU, packed=packed) == []
        [batch] = microbatches([], 10, CPU, packed=packed, at_least=1)
        assert (batch.sequences, batch.response_lengths, batch.shape, batch.padding) == ([], [], (2, 1), 2)
        assert batch.route.take.tolist() == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_has_at_least_two_tokens(packed):
    """Transformer Engine refuses one token if a rank has one key-value head."""
    [batch] = microbatches([ContextSequence([7], [])], 10, CPU, packed=packed)
    assert batch.shape == (2, 1)
    assert batch.input_ids.tolist() == [[7, 0]]
    assert (batch.padding, batch.response_lengths) == (1, [0])


@pytest.mark.parametrize("packed", [False, True])
@given(lengths=LENGTHS, budget=st.integers(1, 60))
def test_padding_to_a_multiple_of_tokens_changes_no_position(
    lengths: list[tuple[int, int]], budget: int, packed: bool
) -> None:
    """In FP8 an empty micro-batch also has the required multiple of tokens."""
    sequences, split = _sequences(lengths), SequenceSplit(token_multiple=16)
    for batch in microbatches(sequences, budget, CPU, split=split, packed=packed, at_least=2):
        assert batch.input_ids.numel() % 16 == 0
        assert batch.shape[0] % 16 == 0
        place = batch.input_ids.T.flatten().tolist()
        wanted = [[*sequences[row].prompt, *sequences[row].response] for row in batch.sequences]
        ends = [
            token
            for row, tokens in zip(batch.sequences, wanted, strict=True)
            for token in tokens[len(sequences[row].prompt) - 1 : -1]
        ]
        assert [place[index] for index in batch.route.take.tolist()] == ends
        if batch.packed is not None:
            assert batch.packed.cu_seqlens_q.tolist()[-1] == batch.shape[0]
