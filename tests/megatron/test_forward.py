"""Hidden states and gradients through Megatron's schedules, against plain autograd through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks
from tests.megatron import cases
from tests.tiny_models import build_student, load_dense, save_tiny_model

GRADIENT_TOLERANCE = 1e-5  # of the largest entry of the same gradient, fp32; measured 2.4e-6
WITH_NORMS = ("qwen3", "qwen3_tied")
KINDS = (*WITH_NORMS, "smollm3")
"""The last without norms of queries and keys, and with a layer without rotary embedding."""
ROWS = range(len(cases.LENGTHS))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """For each kind: the model, its expected gradients (as weights), and its loss."""
    folder = tmp_path_factory.mktemp("dense")
    result = {}
    for kind in KINDS:
        model = save_tiny_model(folder / kind, kind)
        gradients = folder / f"{kind}_gradients"
        result[kind] = (model, gradients, cases.dense_gradients(model, gradients))
    return result


def _hidden_states(student: Any) -> dict[str, Any]:
    from nemo_popsd.megatron.forward import frozen_hidden_states, hidden_states_only, output_weight, student_batches

    def states(sequences: Any, budget: int) -> list[Tensor]:
        batches = student_batches(student.chunks, sequences, budget, packed=False)
        return frozen_hidden_states(student.chunks, batches)

    by_budget = {budget: states(cases.sequences(), budget) for budget in (1, 30, cases.EVERYTHING)}
    student.gpt.train()
    before = student.gpt.post_process
    with pytest.raises(RuntimeError, match="planted"), hidden_states_only(student.gpt):
        raise RuntimeError("planted")
    return {
        "states": by_budget,
        "weight": output_weight(student.gpt).detach().clone(),
        "restored": before is True and student.gpt.post_process is True and student.gpt.training,
        "none": states([], 5),
    }


def _tensor_parallel(rank: int, world_size: int, dense: dict[str, tuple[Path, Path, float]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind, (model, gradients, _) in dense.items():
        expected = cases.expected_gradients(gradients, world_size)
        for name, budget, recompute in (
            ("one batch", cases.EVERYTHING, "none"),
            ("micro-batches", 30, "none"),
            ("recompute", 30, "full"),
        ):
            student = build_student(model, tensor=world_size, recompute=recompute)
            actual, losses = cases.accumulated_gradients(student, ROWS, budget)
            results[f"{kind}, {name}"] = (cases.deviations(actual, expected), sum(losses), len(losses))
        results[f"{kind}, hidden"] = _hidden_states(student)
    return results


def _data_parallel(rank: int, world_size: int, dense: dict[str, tuple[Path, Path, float]]) -> dict[str, Any]:
    """Rank 0 has one sequence, rank 1 the others, in more micro-batches."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    results: dict[str, Any] = {}
    rows = [[2], [0, 1, 3, 4, 5]][rank]
    for kind, (model, gradients, _) in dense.items():
        expected = cases.expected_gradients(gradients, 1)
        actual, losses = cases.accumulated_gradients(build_student(model), rows, 12)
        results[f"{kind}, data parallel"] = (cases.deviations(actual, expected), sum(losses), len(losses))
    return results


def _both(rank: int, world_size: int, dense: dict[str, tuple[Path, Path, float]]) -> dict[str, Any]:
    return _tensor_parallel(rank, world_size, dense) | _data_parallel(rank, world_size, dense)


@pytest.fixture(scope="module")
def one_rank(dense, layers):
    return run_ranks(_tensor_parallel, 1, dense, layers=layers)


@pytest.fixture(scope="module")
def two_ranks(dense, layers):
    return run_ranks(_both, 2, dense, layers=layers)


def _check(results: list[dict[str, Any]], case: str, dense: Any) -> None:
    for result in results:
        errors, _, _ = result[case]
        assert {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE} == {}
        names = " ".join(errors)
        for part in ("word_embeddings", "linear_qkv", "final_layernorm", "linear_fc2"):
            assert part in names
        assert ("q_layernorm" in names) == ("k_layernorm" in names) == case.startswith(WITH_NORMS)
        assert ("output_layer" in names) == ("tied" not in case)
    loss = dense[case.split(",")[0]][2]
    total = sum(r[case][1] for r in results) if "data parallel" in case else results[0][case][1]
    assert total == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one batch", "micro-batches", "recompute"])
def test_gradients_of_every_parameter_equal_the_dense_ones(one_rank, dense, kind, how):
    assert (one_rank[0][f"{kind}, {how}"][2] > 1) == (how != "one batch")
    _check(one_rank, f"{kind}, {how}", dense)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one batch", "micro-batches", "recompute"])
def test_gradients_under_tensor_parallelism_equal_the_dense_ones(two_ranks, dense, kind, how):
    _check(two_ranks, f"{kind}, {how}", dense)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_unequal_shares_equal_those_of_the_union(two_ranks, dense, kind):
    case = f"{kind}, data parallel"
    assert two_ranks[0][case][2] < two_ranks[1][case][2], "ranks run different numbers of micro-batches"
    _check(two_ranks, case, dense)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_hidden_states_yield_the_logits_at_the_predicting_positions(one_rank, two_ranks, dense, kind):
    model = load_dense(dense[kind][0])
    for results in (one_rank, two_ranks):
        weight = torch.cat([result[f"{kind}, hidden"]["weight"] for result in results])[: cases.VOCABULARY]
        for result in results:
            states = result[f"{kind}, hidden"]["states"][30]
            for row, (prompt, response) in enumerate(zip(cases.PROMPTS, cases.RESPONSES, strict=True)):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + response])).logits[0, cases.predicting_positions(row)]
                assert not states[row].requires_grad
                torch.testing.assert_close(states[row] @ weight.T, logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_NORMS)  # whose rounding differs by less than 3e-6
def test_grouping_changes_no_state_and_the_mode_of_the_model_is_restored(one_rank, two_ranks, kind):
    for result in (*one_rank, *two_ranks):
        hidden = result[f"{kind}, hidden"]
        assert hidden["restored"]
        assert hidden["none"] == []
        alone: list[Tensor] = hidden["states"][1]
        assert [len(state) for state in alone] == [r for _, r in cases.LENGTHS]
        for budget in (30, cases.EVERYTHING):
            for state, reference in zip(hidden["states"][budget], alone, strict=True):
                torch.testing.assert_close(state, reference, rtol=0, atol=3e-6)
