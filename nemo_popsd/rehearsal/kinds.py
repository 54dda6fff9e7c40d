"""Which ranks of a layout stand for the others."""

from __future__ import annotations

from nemo_popsd.planning.layout import Layout


def kinds(layout: Layout, *, every: bool = False) -> list[int]:
    """One rank of each kind, in ascending order.

    Ranks differ by their stage (first, inner, last), by their experts and by their shard of the vocabulary, of which
    the last may have padding. Context-parallel ranks differ by at most one token of a response, data-parallel ones not
    at all.

    Args:
        layout: whose ranks are numbered tensor first, then context, data, pipeline.
        every: all of these; otherwise the first shard of the vocabulary, and of the groups of experts the first and
            the last, since tokens visit all experts equally often.
    """
    of_stage = layout.world // layout.pipeline
    groups = range(layout.expert) if every else {0, layout.expert - 1}
    inside = {group * layout.expert_shards for group in groups}
    if every:
        inside.add(layout.tensor - 1)
    return [
        stage * of_stage + rank
        for stage in sorted({0, *_inner(layout), layout.pipeline - 1})
        for rank in sorted(inside)
    ]


def _inner(layout: Layout) -> list[int]:
    return [1] if layout.pipeline > 2 else []
