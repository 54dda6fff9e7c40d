"""Micro-batches of the plan are those of the trainer, padding and routes included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nemo_popsd.megatron.microbatches import ContextSequence, microbatches
from nemo_popsd.megatron.response_routing import SequenceSplit
from nemo_popsd.planning.layout import Layout
from nemo_popsd.planning.packing import packed

LENGTHS = [(40, 16), (57, 16), (57, 16), (33, 16), (20, 16), (41, 16)]


def _group(size: int, rank: int) -> Any:
    return cast(Any, SimpleNamespace(size=lambda: size, rank=lambda: rank))


@pytest.mark.parametrize(("tensor", "context", "virtual"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 2)])
@pytest.mark.parametrize("budget", [60, 130, 1000])
def test_micro_batches_are_the_trainers(tensor: int, context: int, virtual: int, budget: int) -> None:
    pipeline = 2 if virtual > 1 else 1
    layout = Layout(
        nodes=1,
        gpus_per_node=tensor * context * pipeline,
        tensor=tensor,
        sequence=tensor > 1,
        context=context,
        pipeline=pipeline,
        virtual_pipeline=virtual,
    )
    sequences = [ContextSequence([1] * (length - response), [1] * response) for length, response in LENGTHS]
    for rank in range(context):
        split = SequenceSplit(_group(context, rank) if context > 1 else None, _group(tensor, 0) if tensor > 1 else None)
        found = packed(LENGTHS, budget, layout)
        real = microbatches(
            sequences,
            budget,
            torch.device("cpu"),
            split=split,
            packed=True,
            one_shape=virtual > 1,
            count_multiple=pipeline if virtual > 1 else 1,
            at_least=1,
        )
        assert [batch.tokens for batch in found] == [batch.shape[0] for batch in real]
        for mine, its in zip(found, real, strict=True):
            bounds = its.host_bounds
            assert bounds is not None
            assert list(mine.lengths) == bounds.diff().tolist()
            assert mine.gathered_rows(layout, rank) == len(its.route.slice_counts) * max(its.route.slice_counts)
            assert mine.held_rows(layout, rank) == sum(its.route.slice_counts)
            assert mine.owned_rows(layout, rank) == len(its.response_ids)
