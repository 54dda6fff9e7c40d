"""Local layers read the bounds of packed sequences on the host: no layer waits for the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model

LENGTHS = (5, 1, 9, 12)


def _hidden_states(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """Hidden states of packed sequences, also with bounds on device "meta", which has no values to read."""
    from nemo_popsd.megatron import forward
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence

    student = build_student(model, parallel={"context": world_size})
    sequences = [ContextSequence([3, 4, 5 + length], list(range(length))) for length in LENGTHS]
    batches = student_batches(student.chunks, sequences, 64, packed=True)
    results: dict[str, Any] = {"expected": frozen_hidden_states(student.chunks, batches)}
    unreadable = []
    for batch in batches:
        assert batch.packed is not None
        bounds = batch.packed.cu_seqlens_q.to("meta")
        unreadable.append(replace(batch, packed=replace(batch.packed, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)))
    results["unreadable"] = frozen_hidden_states(student.chunks, unreadable)
    forward._packed_params = lambda batch, local: batch.packed  # as Megatron has it
    results["without host bounds"] = frozen_hidden_states(student.chunks, batches)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        frozen_hidden_states(student.chunks, unreadable)
    return results


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_layer_reads_bounds_on_the_device_and_no_bit_changes(tmp_path: Path, ranks: int) -> None:
    """Also with context parallelism, where each rank rotates its own parts of every sequence."""
    model = save_tiny_model(tmp_path / "model", "qwen3")
    for results in run_ranks(_hidden_states, ranks, model):
        assert len(results["expected"]) == len(LENGTHS)
        for name in ("unreadable", "without host bounds"):
            for got, expected in zip(results[name], results["expected"], strict=True):
                assert torch.equal(got, expected), name
