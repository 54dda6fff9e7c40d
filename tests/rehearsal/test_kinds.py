"""The ranks that represent the others."""

from __future__ import annotations

from nemo_popsd.planning.layout import Layout
from nemo_popsd.rehearsal.kinds import kinds


def test_one_rank_of_each_kind() -> None:
    def of(every: bool = False, **sizes: int) -> list[int]:
        return kinds(Layout(nodes=4, gpus_per_node=8, **sizes), every=every)

    assert of() == of(every=True) == [0]
    assert of(tensor=4) == [0]
    assert of(tensor=4, every=True) == [0, 3]
    assert of(pipeline=2) == [0, 16]
    assert of(pipeline=4, tensor=2) == [0, 8, 24], "first, an inner and the last stage"
    assert of(expert=8) == [0, 7]
    assert of(expert=8, every=True) == list(range(8))
    assert of(expert=4, pipeline=2) == [0, 3, 16, 19]
