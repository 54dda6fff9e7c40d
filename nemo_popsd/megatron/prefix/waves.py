"""Plans which tokens of a prefix forest pass the model together, and which keys each of them needs. Uses no tensors.

A wave is one forward pass. It processes nodes of the forest in depth-first order until its token budget is full. A
later wave therefore always continues a single path, the ancestors of its first node. Their keys and values are cached
at their positions, so the cache never needs more positions than the longest sequence has. If a wave contains siblings
together with their parent, no key is cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nemo_popsd.megatron.prefix.forest import PrefixForest


@dataclass
class Piece:
    """Consecutive tokens of one sequence: a node, and the first children below it that the same wave computes."""

    place: int
    """Index of the first token in the wave."""
    begin: int
    """Position of the first token in the sequence."""
    cached: int
    """Number of positions from 0 whose keys are read from the cache."""
    above: tuple[tuple[int, int], ...]
    """Spans of this wave, (index, number of tokens), with the positions from `cached` to `begin`, in order."""
    tokens: list[int]
    """Token ids."""


@dataclass
class Wave:
    """One forward pass over concatenated pieces."""

    pieces: list[Piece] = field(default_factory=list)
    kept: list[tuple[int, int, int]] = field(default_factory=list)
    """Keys that later waves need: (index in the wave, number of tokens, position in the cache)."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Index in the wave of the first token of each node that this wave computes."""
    repeated: int = 0
    """Tokens that an earlier wave also computed, but that did not fit into the cache."""

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


def plan_waves(forest: PrefixForest, token_budget: int, cache_tokens: int) -> list[Wave]:
    """The waves that compute each node of `forest` once.

    Args:
        forest: forest of the sequences.
        token_budget: maximum number of tokens in a wave; a longer node has its own wave.
        cache_tokens: maximum number of positions whose keys are cached. A wave recomputes the part of its path beyond
            them.
    """
    planner = _Planner(forest, cache_tokens)
    for index, node in enumerate(forest.nodes):
        if planner.wave.nodes and planner.wave.tokens + len(node.tokens) > token_budget:
            planner.next_wave(index)
        planner.add(index)
    return planner.waves if forest.nodes else []


def cached_positions(waves: Sequence[Wave]) -> int:
    """Positions that the cache of `waves` needs."""
    return max((at + count for wave in waves for _, count, at in wave.kept), default=0)


class _Planner:
    def __init__(self, forest: PrefixForest, cache_tokens: int) -> None:
        self._forest, self._limit = forest, cache_tokens
        self.waves = [Wave()]
        # For each node of the open path or of this wave: the piece and the number of its tokens up to the node's end,
        # or None if the cache holds the node.
        self._where: dict[int, tuple[Piece, int] | None] = {}
        self._last: int | None = None  # the node whose end is that of the last piece

    @property
    def wave(self) -> Wave:
        return self.waves[-1]

    def add(self, index: int) -> None:
        """Adds a node to the wave, which contains its parent or continues a path through it."""
        node = self._forest.nodes[index]
        if node.parent is None or node.parent != self._last:
            self._begin(node.begin, *self._keys(node.parent))
        piece = self.wave.pieces[-1]
        self.wave.nodes[index] = piece.place + len(piece.tokens)
        piece.tokens += node.tokens
        self._where[index] = piece, len(piece.tokens)
        self._last = index

    def next_wave(self, index: int) -> None:
        """Ends the wave; the next one continues the path above node `index`, reading from the cache what it holds."""
        nodes, path = self._forest.nodes, self._forest.path(self._forest.nodes[index].parent)
        length = nodes[path[-1]].end if path else 0
        cached = min(length, self._limit)
        self.wave.kept = list(self._new_in_cache(path, cached))
        self.waves.append(Wave())
        self._where = dict.fromkeys(path)
        self._last = None
        if cached < length:
            self._begin(cached, cached, ())
            piece = self.wave.pieces[0]
            piece.tokens += [token for ancestor in path for token in nodes[ancestor].tokens][cached:]
            self.wave.repeated = length - cached
            self._where |= {a: (piece, nodes[a].end - cached) for a in path if nodes[a].end > cached}
            self._last = path[-1]

    def _new_in_cache(self, path: list[int], cached: int) -> Iterator[tuple[int, int, int]]:
        """The parts of the first `cached` positions of `path` that this wave computed."""
        for ancestor in path:
            node = self._forest.nodes[ancestor]
            place = self.wave.nodes.get(ancestor)
            if place is not None and node.begin < cached:
                yield place, min(node.end, cached) - node.begin, node.begin

    def _keys(self, parent: int | None) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Locations of the keys for a piece below `parent`: the number of cached positions, and spans of this wave."""
        if parent is None:
            return 0, ()
        where = self._where[parent]
        if where is None:
            return self._forest.nodes[parent].end, ()
        piece, count = where
        return piece.cached, (*piece.above, (piece.place, count))

    def _begin(self, begin: int, cached: int, above: tuple[tuple[int, int], ...]) -> None:
        self.wave.pieces.append(Piece(self.wave.tokens, begin, cached, above, []))
