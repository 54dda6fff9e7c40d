"""The forest holds each distinct prefix once, and the waves compute each from the keys of exactly its own prefix."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from nemo_popsd.megatron.prefix.forest import PrefixForest
from nemo_popsd.megatron.prefix.waves import Wave, cached_positions, plan_waves

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)
"""Three tokens, so that many sequences share a prefix, contain each other or are equal."""


def distinct(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}


def prefix_of(forest: PrefixForest, node: int) -> list[int]:
    return [token for index in forest.path(node) for token in forest.nodes[index].tokens]


@given(SEQUENCES)
def test_each_distinct_prefix_is_in_one_node(sequences: list[list[int]]) -> None:
    forest = PrefixForest.of(sequences)
    prefixes = []
    for index, node in enumerate(forest.nodes):
        whole = prefix_of(forest, index)
        assert len(whole) == node.end
        assert node.tokens
        prefixes += [tuple(whole[:end]) for end in range(node.begin + 1, node.end + 1)]
    assert sorted(prefixes) == sorted(distinct(sequences))
    assert forest.tokens == len(distinct(sequences))
    assert [prefix_of(forest, end) for end in forest.ends] == sequences


@given(SEQUENCES)
def test_nodes_are_depth_first_and_no_longer_than_needed(sequences: list[list[int]]) -> None:
    forest = PrefixForest.of(sequences)
    open_path: list[int] = []
    for index, node in enumerate(forest.nodes):
        while open_path and open_path[-1] != node.parent:
            open_path.pop()
        assert (open_path[-1] if open_path else None) == node.parent
        open_path.append(index)
    for index in range(len(forest.nodes)):
        children = [node for node in forest.nodes if node.parent == index]
        assert len({child.tokens[0] for child in children}) == len(children)
        assert len(children) != 1 or index in forest.ends, "a node with one child ends a sequence"


def execute(waves: list[Wave], capacity: int) -> list[list[tuple[int, ...]]]:
    """For each wave and index, the tokens to whose keys a token attends according to the cache, its own last."""
    cache: list[tuple[int, ...] | None] = [None] * capacity
    seen = []
    for wave in waves:
        prefixes: list[tuple[int, ...]] = []
        for piece in wave.pieces:
            assert piece.place == len(prefixes)
            keys = [cache[position] for position in range(piece.cached)]
            for place, count in piece.above:
                assert place + count <= len(prefixes), "only tokens before the piece"
                keys += prefixes[place : place + count]
            assert len(keys) == piece.begin
            for number, token in enumerate(piece.tokens):
                before = keys[-1] if keys else ()
                assert before is not None
                keys.append((*before, token))
                assert keys == [keys[-1][:end] for end in range(1, piece.begin + number + 2)], (
                    "keys of its prefix alone"
                )
            prefixes += [key for key in keys[piece.begin :] if key is not None]
        for place, count, position in wave.kept:
            cache[position : position + count] = prefixes[place : place + count]
        seen.append(prefixes)
    return seen


@given(SEQUENCES, st.integers(1, 20), st.integers(0, 12))
def test_waves_attend_to_exactly_their_prefixes(sequences: list[list[int]], budget: int, cache_tokens: int) -> None:
    forest = PrefixForest.of(sequences)
    waves = plan_waves(forest, budget, cache_tokens)
    assert cached_positions(waves) <= cache_tokens
    seen = execute(waves, cached_positions(waves))
    computed = sum(map(len, seen))
    repeated = sum(wave.repeated for wave in waves)
    assert computed == forest.tokens + repeated
    longest = max((node.begin for node in forest.nodes), default=0)
    assert not repeated or cache_tokens < longest
    places = {}
    for wave, prefixes in zip(waves, seen, strict=True):
        assert len(wave.nodes) == 1 or wave.tokens - wave.repeated <= budget
        for node, place in wave.nodes.items():
            assert node not in places
            places[node] = prefixes[place : place + len(forest.nodes[node].tokens)]
    for index, node in enumerate(forest.nodes):
        whole = tuple(prefix_of(forest, index))
        assert places[index] == [whole[:end] for end in range(node.begin + 1, node.end + 1)]


def test_one_wave_keeps_no_keys() -> None:
    forest = PrefixForest.of([[1, 2, 3], [1, 2, 4], [1, 5]])
    [wave] = plan_waves(forest, 100, 100)
    assert wave.kept == []
    assert [piece.tokens for piece in wave.pieces] == [[1, 2, 3], [4], [5]]
    assert [piece.above for piece in wave.pieces] == [(), ((0, 2),), ((0, 1),)]


def test_no_sequences_need_no_wave() -> None:
    assert plan_waves(PrefixForest.of([]), 10, 10) == []


def test_planning_needs_no_torch() -> None:
    code = "import sys, nemo_popsd.megatron.prefix.waves; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
