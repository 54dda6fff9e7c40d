"""Which tokens of a forest of prefixes go through the model together, and whose keys each of them needs. No tensors.

A forward pass, a wave, takes nodes of the forest in its order, depth first, until its token budget is full. What a
later wave continues is then always one path: the ancestors of its first node. Their keys and values are kept at their
positions, so that the cache never needs more positions than the longest sequence has. Siblings follow each other, and
where a wave holds them with their parent, no key is kept at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nemo_popsd.megatron.prefix.forest import PrefixForest


@dataclass
class Piece:
    """Consecutive tokens of one sequence: a node, and first children below it that the same wave computes."""

    place: int
    """Where its first token is in the wave."""
    begin: int
    """Position of its first token in the sequence."""
    cached: int
    """Number of positions, from 0, whose keys it reads from the cache."""
    above: tuple[tuple[int, int], ...]
    """What follows these before `begin`: (place, number of tokens) in this wave, in the order of the positions."""
    tokens: list[int]
    """Token ids."""


@dataclass
class Wave:
    """One forward pass: pieces one after the other."""

    pieces: list[Piece] = field(default_factory=list)
    kept: list[tuple[int, int, int]] = field(default_factory=list)
    """Keys that later waves need: (place, number of tokens, position in the cache)."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Place of the first token of each node that this wave computes."""
    repeated: int = 0
    """Tokens that an earlier wave computed, too, and that the cache could not keep."""

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


def plan_waves(forest: PrefixForest, token_budget: int, cache_tokens: int) -> list[Wave]:
    """The waves that compute each node of `forest` once.

    Args:
        forest: of the sequences.
        token_budget: largest number of tokens of a wave; a node that is longer is a wave of its own.
        cache_tokens: largest number of positions whose keys are kept. A wave computes again what it needs of a path
            beyond them.
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
        # By node of the open path or of this wave: the piece and the number of its tokens up to the node's end. None
        # where the cache holds the node.
        self._where: dict[int, tuple[Piece, int] | None] = {}
        self._last: int | None = None  # the node whose end is that of the last piece

    @property
    def wave(self) -> Wave:
        return self.waves[-1]

    def add(self, index: int) -> None:
        """Adds a node to the wave, which holds its parent or continues a path through it."""
        node = self._forest.nodes[index]
        if node.parent is None or node.parent != self._last:
            self._begin(node.begin, *self._keys(node.parent))
        piece = self.wave.pieces[-1]
        self.wave.nodes[index] = piece.place + len(piece.tokens)
        piece.tokens += node.tokens
        self._where[index] = piece, len(piece.tokens)
        self._last = index

    def next_wave(self, index: int) -> None:
        """Ends the wave; the next one continues the path above node `index`, as much of it from the cache as fits."""
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
        """What this wave computed of the first `cached` positions of `path`."""
        for ancestor in path:
            node = self._forest.nodes[ancestor]
            place = self.wave.nodes.get(ancestor)
            if place is not None and node.begin < cached:
                yield place, min(node.end, cached) - node.begin, node.begin

    def _keys(self, parent: int | None) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Where a piece below `parent` finds its keys: cached positions, and spans of this wave."""
        if parent is None:
            return 0, ()
        where = self._where[parent]
        if where is None:
            return self._forest.nodes[parent].end, ()
        piece, count = where
        return piece.cached, (*piece.above, (piece.place, count))

    def _begin(self, begin: int, cached: int, above: tuple[tuple[int, int], ...]) -> None:
        self.wave.pieces.append(Piece(self.wave.tokens, begin, cached, above, []))
