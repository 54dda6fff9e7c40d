"""Selects ranks of a layout that represent the others."""

from __future__ import annotations

from nemo_popsd.planning.layout import Layout


def kinds(layout: Layout, *, every: bool = False) -> list[int]:
    """One rank of each kind, in ascending order.

    Ranks differ in their stage (first, inner, last), their experts and their vocabulary shard, the last of which may
    have padding. Context-parallel ranks differ by at most one token of a response; data-parallel ranks do not differ.

    Args:
        layout: ranks are numbered in the order tensor, context, data, pipeline.
        every: select all kinds; otherwise only the first vocabulary shard, and the first and the last group of experts,
            because tokens visit all experts equally often.
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
