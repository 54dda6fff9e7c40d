"""Hidden states with shared prefixes against those of separate sequences, and the tokens that pass the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks
from tests.layers import BOTH
from tests.tiny_models import build_student, save_tiny_model

KINDS = ["qwen3", "qwen2", "smollm3", "qwen3_moe"]
"""Norms over heads, biases, layers without rotary embedding, experts."""
HEAD = [7, 7, 9]
"""Begins every context, as a chat template does."""


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def sequences() -> list[Any]:
    """Two rows with three responses each in three contexts, reference first; and what borders on special cases."""
    from nemo_popsd.megatron.microbatches import ContextSequence

    listed = []
    for row in range(2):
        question, reference = _ids(6, 10 + row), _ids(23, 20 + row)
        responses = [_ids(count, 30 + 10 * row + number) for number, count in enumerate((11, 1, 5))]
        responses[2][:3] = responses[0][:3]  # two responses begin alike
        for prompt in ([*question, 4], [*reference, *question, 4], [*reference, 4]):
            listed += [ContextSequence([*HEAD, *prompt], response) for response in responses]
    return [
        *listed,
        ContextSequence([3], [5]),
        ContextSequence([8, 8], []),
        ContextSequence([8, 8], [1, 2]),
        listed[0],
        ContextSequence(listed[0].prompt, listed[0].response[:4]),
        ContextSequence([*listed[0].prompt, *listed[0].response[:4]], listed[0].response[4:]),
    ]


WAYS = {
    "one wave": (10_000, 0),
    "waves": (40, 100),
    "small cache": (40, 9),
    "no cache": (25, 0),
    "node by node": (1, 100),
}
"""Token budget and cache tokens."""


def observe(
    rank: int, world_size: int, source: Path, parallel: dict[str, Any], student: dict[str, Any], double: bool
) -> Any:
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.prefix.forward import shared_hidden_states, why_not_shared

    built = build_student(source, parallel=parallel, **student)
    if built.adapters is not None:
        _randomize(built)
    listed, seen = sequences(), {}
    with built.base.model() as chunks:
        assert why_not_shared(chunks) is None
        if double:
            for chunk in chunks:
                chunk.double()  # type: ignore[attr-defined]
                chunk.config.params_dtype = torch.float64
        before = [layer.self_attention.core_attention for layer in chunks[0].decoder.layers]
        batches = student_batches(chunks, listed, 60, packed=True)
        seen["separate"] = frozen_hidden_states(chunks, batches)
        tokens: list[int] = []
        hooks = [
            layer.mlp.register_forward_pre_hook(
                lambda _, inputs: tokens.append(inputs[0].shape[0] * inputs[0].shape[1])
            )
            for chunk in chunks
            for layer in chunk.decoder.layers
        ]
        for name, (budget, cache) in WAYS.items():
            tokens.clear()
            seen[name] = shared_hidden_states(chunks, listed, budget, cache)
            seen[f"{name}, tokens"] = sum(tokens) * (world_size if parallel.get("sequence") else 1) / len(hooks)
        seen["nothing"] = shared_hidden_states(chunks, [], 40, 100)[0]
        for hook in hooks:
            hook.remove()
        seen["again"] = frozen_hidden_states(chunks, batches)
        assert before == [layer.self_attention.core_attention for layer in chunks[0].decoder.layers]
    return seen


def _randomize(student: Any) -> None:
    """Adapters that would change the states if they were not off."""
    with torch.no_grad():
        for chunk in student.chunks:
            for name, parameter in chunk.named_parameters():
                if "adapter" in name:
                    parameter.add_(0.1)


def check(seen: dict[str, Any], tolerance: float) -> None:
    """`tolerance` is relative to the largest entry of all states."""
    separate: list[Tensor] = seen["separate"]
    tolerance *= float(torch.cat(separate).abs().max())
    listed = sequences()
    distinct = {(*s.prompt, *s.response)[:end] for s in listed for end in range(1, len(s) + 1)}
    for name, (_, cache) in WAYS.items():
        states, count = seen[name]
        assert len(states) == len(separate)
        for one, other in zip(states, separate, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        assert count.real + count.saved == sum(map(len, listed))
        assert count.real == len(distinct) if cache == 100 or name == "one wave" else count.real > len(distinct)
        assert seen[f"{name}, tokens"] == count.real + count.padding
    assert all(torch.equal(a, b) for a, b in zip(seen["again"], separate, strict=True))
    assert seen["nothing"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_those_of_separate_sequences_in_double_precision(tmp_path: Path, kind: str) -> None:
    [seen] = run_ranks(observe, 1, save_tiny_model(tmp_path, kind), {}, {}, True)
    assert seen["separate"][0].dtype == torch.float64
    check(seen, 1e-10)


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {"adaptation": "lora"}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2 sp": (2, {"tensor": 2, "sequence": "true"}, {"adaptation": "lora"}),
    "pp2": (2, {"pipeline": 2}, {"adaptation": "lora"}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str, layers: str) -> None:
    world_size, parallel, student = LAYOUTS[layout]
    source = save_tiny_model(tmp_path, num_hidden_layers=4)
    for seen in run_ranks(observe, world_size, source, parallel, student, False, layers=layers):
        if seen["separate"]:
            check(seen, 1e-5)
