"""Megatron's engine generates the same responses in any layout, and does not change the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.megatron.config import LoRAConfig
from tests.harness import run_ranks
from tests.rollout.test_megatron_engine import GREEDY, RANDOM, REQUESTS
from tests.tiny_models import build_student, save_tiny_model
from tests.training.layouts import randomize_adapters

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2 sp": (2, {"tensor": 2, "sequence": "true"}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2 uneven": (2, {"pipeline": 2, "last_stage_layers": 1}),
    "cp2": (2, {"context": 2}),
    "tp2 sp cp2": (4, {"tensor": 2, "sequence": "true", "context": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "hf", num_hidden_layers=4)


def observe(rank: int, world_size: int, model: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Responses of a student with adapters, and hidden states of its training forward before and after."""
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence
    from nemo_popsd.rollout.megatron_engine import MegatronEngine

    lora = {"adaptation": "lora", "lora": LoRAConfig(rank=4, alpha=6.0)}
    student = build_student(model, parallel=parallel, **lora)
    randomize_adapters(student)
    engine = MegatronEngine(
        student.chunks, vocab_size=student.vocab_size, batch_rows=4, cache_tokens=1 << 20, weights_version=lambda: 3
    )
    sequences = [ContextSequence(q.prompt, list(q.prompt)) for q in REQUESTS]
    batches = student_batches(student.chunks, sequences, 40, packed=False)
    states = lambda: [state.clone() for state in frozen_hidden_states(student.chunks, batches)]  # noqa: E731
    before, seen = states(), {}
    for name, sampling in (("greedy", GREEDY), ("random", RANDOM)):
        seen[name] = engine.generate(REQUESTS, sampling)
    seen["none"] = engine.generate([], RANDOM)
    seen["one"] = engine.generate(REQUESTS[:1], RANDOM)
    seen["same after"] = all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    seen["states"] = len(before)
    seen["trains"] = all(chunk.training for chunk in student.chunks)
    return seen


@pytest.fixture(scope="module")
def one(model: Path) -> dict[str, Any]:
    return run_ranks(observe, 1, model, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_are_those_of_one_process(model: Path, one: dict[str, Any], layout: str, layers: str) -> None:
    ranks = run_ranks(observe, LAYOUTS[layout][0], model, LAYOUTS[layout][1], layers=layers)
    for seen in ranks:
        for name in ("greedy", "random", "one"):
            for actual, expected in zip(seen[name], one[name], strict=True):
                assert actual.response == expected.response, name
                assert actual.log_probs == pytest.approx(expected.log_probs, abs=2e-5)
                assert (actual.truncated, actual.weights_version) == (expected.truncated, 3)
        assert seen["none"] == []
        assert seen["same after"], "generation changed the training forward"
        assert seen["trains"]
    assert any(seen["states"] == len(REQUESTS) for seen in ranks)


EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 sp": (2, {"tensor": 2, "sequence": "true"}),
    "ep2": (2, {"expert": 2}),
    "tp2 sp ep2": (2, {"tensor": 2, "sequence": "true", "expert": 2}),
    "tp2 sp ep2 etp2": (4, {"tensor": 2, "sequence": "true", "expert": 2, "expert_tensor": 2}),
    "pp2 ep2": (4, {"pipeline": 2, "expert": 2}),
}


def observe_experts(rank: int, world_size: int, model: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Responses of a mixture of experts to this data-parallel rank's share of the requests; shares are unequal."""
    from megatron.core import parallel_state

    from nemo_popsd.rollout.megatron_engine import MegatronEngine

    student = build_student(model, parallel=parallel)
    engine = MegatronEngine(
        student.chunks, vocab_size=student.vocab_size, batch_rows=4, cache_tokens=1 << 20, weights_version=lambda: 3
    )
    share, shares = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = [n for n in range(len(REQUESTS)) if shares == 1 or (n < 2) == (share == 0)]
    budgeted = engine.generate([REQUESTS[n] for n in own], replace(RANDOM, token_budget=20))
    return {
        "indices": own,
        "random": engine.generate([REQUESTS[n] for n in own], RANDOM),
        "budgeted": budgeted,
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("mixture") / "hf", "qwen3_moe")


@pytest.fixture(scope="module")
def one_mixture(mixture: Path) -> dict[str, Any]:
    return run_ranks(observe_experts, 1, mixture, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_on_several_ranks_generate_the_same_as_one_process(
    mixture: Path, one_mixture: dict[str, Any], layout: str, layers: str
) -> None:
    ranks = run_ranks(observe_experts, EXPERTS[layout][0], mixture, EXPERTS[layout][1], layers=layers)
    assert set().union(*(seen["indices"] for seen in ranks)) == set(range(len(REQUESTS)))
    for seen in ranks:
        for index, actual, budgeted in zip(seen["indices"], seen["random"], seen["budgeted"], strict=True):
            expected = one_mixture["random"][index]
            assert (actual.response, actual.truncated) == (expected.response, expected.truncated)
            assert actual.log_probs == pytest.approx(expected.log_probs, abs=2e-5)
            assert budgeted.response == expected.response[: len(budgeted.response)]
    assert any(rollout.unfinished for seen in ranks for rollout in seen["budgeted"])
