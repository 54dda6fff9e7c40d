"""Layouts that contradict themselves, the world, or the architecture are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.limits import refuse_indivisible
from nemo_popsd.parallel.config import ParallelConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, r"parallel\.tensor=0"),
        ({"context": 0}, r"parallel\.context=0"),
        ({"sequence": True}, r"parallel\.sequence=true with parallel\.tensor=1.*parallel\.sequence=false"),
        ({"virtual_pipeline": 2}, r"parallel\.virtual_pipeline=2 with parallel\.pipeline=1.*set parallel\.pipeline"),
    ],
)
def test_contradictory_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "ranks", "message"),
    [
        ({"tensor": 2}, 1, r"parallel\.tensor=2 with 1 rank; .*multiple of 2 ranks"),
        ({"tensor": 2, "pipeline": 2, "context": 2}, 12, r"with 12 ranks; .*8 \(tensor · pipeline · context\)"),
        ({"pipeline": 2, "expert": 4}, 4, r"8 \(expert · pipeline\)"),
    ],
)
def test_worlds_that_the_layout_does_not_divide_are_refused(fields: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(**fields).check_world(ranks)


def test_layouts_that_divide_the_world_are_accepted() -> None:
    ParallelConfig().check_world(3)
    layout = ParallelConfig(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, context=2, expert=2)
    layout.check_world(16)
    assert layout.replica_ranks == 8
    assert ParallelConfig().describe() == "parallel.tensor=1"
    assert ParallelConfig(pipeline=2, expert=4).describe() == "parallel.pipeline=2 parallel.expert=4"


ARCHITECTURE = {"num_attention_heads": 8, "num_query_groups": 4, "num_layers": 6, "num_moe_experts": None}


@pytest.mark.parametrize(
    ("fields", "architecture", "message"),
    [
        ({"tensor": 3}, {}, r"8 attention heads with parallel\.tensor=3"),
        ({"tensor": 8}, {}, r"4 key-value heads with parallel\.tensor=8"),
        ({"pipeline": 4}, {}, r"6 layers with parallel\.pipeline=4"),
        ({"pipeline": 2, "virtual_pipeline": 2}, {}, r"6 layers.*a multiple of 4 layers"),
        ({"expert": 2}, {}, r"0 experts with parallel\.expert=2"),
        ({"expert": 4}, {"num_moe_experts": 6}, r"6 experts with parallel\.expert=4"),
        ({"tensor": 2}, {"num_moe_experts": 6}, r"6 experts.*set parallel\.sequence=true"),
    ],
)
def test_architectures_that_the_layout_does_not_divide_are_refused(
    fields: dict[str, Any], architecture: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_indivisible(SimpleNamespace(**{**ARCHITECTURE, **architecture}), ParallelConfig(**fields))


def test_an_architecture_that_the_layout_divides_is_accepted() -> None:
    layout = ParallelConfig(tensor=4, sequence=True, pipeline=3, virtual_pipeline=2, expert=2)
    refuse_indivisible(SimpleNamespace(**{**ARCHITECTURE, "num_moe_experts": 4}), layout)
