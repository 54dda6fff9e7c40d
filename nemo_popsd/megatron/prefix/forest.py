"""The forest of token prefixes of a set of sequences. Uses no tensors.

Attention is causal, so the output of a layer at a position depends only on the tokens up to it. Sequences that begin
with the same tokens share these positions, and each distinct prefix needs to be computed only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class PrefixNode:
    """Tokens that all sequences through this node share after those of its ancestors; at least one."""

    parent: int | None
    """Index of the node that ends where this node begins; None at position 0."""
    begin: int
    """Position of the first token."""
    tokens: Sequence[int]
    """Token ids."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.begin + len(self.tokens)


@dataclass(frozen=True)
class PrefixForest:
    """The distinct prefixes of sequences as trees of nodes; sequences branch or end only at the end of a node."""

    nodes: list[PrefixNode]
    """Nodes in depth-first order: a parent is followed by its first child and its subtree, then by its second child.
    The child with the longest sequence comes first."""
    ends: list[int]
    """For each sequence, the index of the node with its last token."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> PrefixForest:
        """The forest of `sequences`, each of at least one token; only `ends` depends on their order."""
        tokens = [list(sequence) for sequence in sequences]
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        nodes: list[PrefixNode] = []
        ends = [-1] * len(tokens)
        pending = list(reversed(_branches(tokens, order, 0, None)))
        while pending:
            group, begin, parent = pending.pop()
            first, last = tokens[group[0]], tokens[group[-1]]
            end = _common(first, last)  # of all between them, because they are sorted
            index = len(nodes)
            nodes.append(PrefixNode(parent, begin, first[begin:end]))
            while group and len(tokens[group[0]]) == end:
                ends[group[0]] = index
                group = group[1:]
            pending += reversed(_branches(tokens, group, end, index))
        return cls(nodes, ends)

    @property
    def tokens(self) -> int:
        """Number of distinct prefixes."""
        return sum(len(node.tokens) for node in self.nodes)

    def upwards(self, node: int | None) -> Iterator[int]:
        """`node` and its ancestors, up to the root at position 0."""
        while node is not None:
            yield node
            node = self.nodes[node].parent

    def path(self, node: int | None) -> list[int]:
        """The same nodes in reverse order, from position 0 to `node`."""
        return list(self.upwards(node))[::-1]


_Branch = tuple[list[int], int, int | None]
"""Sorted sequences that share a node, the position at which it begins, and its parent."""


def _branches(tokens: list[list[int]], order: list[int], begin: int, parent: int | None) -> list[_Branch]:
    """The children of a node that ends at `begin`: groups the sorted sequences `order` by next token, longest first."""
    groups = [list(group) for _, group in groupby(order, key=lambda index: tokens[index][begin])]
    groups.sort(key=lambda group: -max(len(tokens[index]) for index in group))
    return [(group, begin, parent) for group in groups]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
