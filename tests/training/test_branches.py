"""The frozen branches against one dense forward per context, and the choice of branches that run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny_models import load_dense, save_tiny_model

LENGTHS = (5, 1, 8, 3)
BUDGETS = (1, 40, 10_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "hf")


def observe(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    from nemo_popsd.distillation import Target
    from nemo_popsd.megatron import forward
    from nemo_popsd.training import branches
    from tests.tiny_models import build_student
    from tests.training.runs import trajectory

    student = build_student(model)
    rows = [trajectory(number, length) for number, length in enumerate(LENGTHS)]
    sequences: list[int] = []

    def counted(chunks: Any, batches: Any) -> Any:
        sequences.append(sum(len(batch.sequences) for batch in batches))
        return forward.frozen_hidden_states(chunks, batches)

    branches.frozen_hidden_states = counted  # type: ignore[attr-defined]

    def states(target: Any, budget: int = 10_000, diagnosed: int = 0, **options: Any) -> Any:
        return branches.FrozenBranches(
            student.base, student.base, target, token_budget=budget, diagnosed_tokens=diagnosed, **options
        ).target_states(rows)

    seen: dict[str, Any] = {f"budget {budget}": states(Target.purified(), budget) for budget in BUDGETS}
    seen["shared"] = states(Target.purified(), 40, shared_cache_tokens=30)
    targets = {
        "purified": Target.purified(),
        "uncapped": Target.purified(beta=2.0, cap=None),
        "opsd": Target.opsd(),
        "beta_opsd": Target.beta_opsd(0.25),
        "student_pmi": Target.live_student_pmi(),
        "base alone": Target(base=1.0),
    }
    for name, target in targets.items():
        sequences.clear()
        seen[name] = states(target)
        seen[f"{name} sequences"] = list(sequences)
    sequences.clear()
    for count in (1, 7, 10_000):
        seen[f"diagnosed {count}"] = states(Target.opsd(), diagnosed=count)
    seen["again"] = states(Target.opsd(), diagnosed=7)
    seen["diagnosed sequences"] = list(sequences)
    return seen


@pytest.fixture(scope="module")
def seen(model: Path) -> dict[str, Any]:
    return run_ranks(observe, 1, model)[0]


@pytest.fixture(scope="module")
def dense(model: Path) -> list[dict[str, torch.Tensor]]:
    """Final hidden states [R, H] of each row in each of its contexts, after the last norm."""
    from tests.training.runs import trajectory

    body = load_dense(model).model
    rows = []
    for number, length in enumerate(LENGTHS):
        t = trajectory(number, length)
        prompts = {name: getattr(t.row.contexts, name) for name in ("student", "privileged", "reference")}
        rows.append(
            {
                name: torch.stack(
                    [
                        body(torch.tensor([[*prompt, *t.rollout.response[:number]]])).last_hidden_state[0, -1].detach()
                        for number in range(length)
                    ]
                )
                for name, prompt in prompts.items()
            }
        )
    return rows


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", [*(f"budget {budget}" for budget in BUDGETS), "shared"])
def test_states_match_separate_forwards_of_the_right_contexts(
    seen: dict[str, Any], dense: list[dict[str, torch.Tensor]], way: str
) -> None:
    for states, expected in zip(seen[way], dense, strict=True):
        close(states.vectors.anchor, expected["student"])
        close(states.vectors.shift, expected["privileged"] - expected["reference"])
        assert not states.vectors.anchor.requires_grad
        assert not states.vectors.shift.requires_grad
        assert states.diagnosed is None


def test_each_target_gets_its_vectors(seen: dict[str, Any], dense: list[dict[str, torch.Tensor]]) -> None:
    for row, expected in enumerate(dense):
        base, privileged, reference = (expected[name] for name in ("student", "privileged", "reference"))
        close(seen["uncapped"][row].vectors.anchor, base + (privileged - reference) / 2)
        close(seen["opsd"][row].vectors.anchor, privileged)
        close(seen["beta_opsd"][row].vectors.anchor, 0.75 * base + 0.25 * privileged)
        close(seen["student_pmi"][row].vectors.shift, privileged - reference)
        close(seen["base alone"][row].vectors.anchor, base)
        assert seen["student_pmi"][row].vectors.anchor is None
        assert all(seen[name][row].vectors.shift is None for name in ("uncapped", "opsd", "beta_opsd", "base alone"))


def test_branches_without_a_coefficient_are_not_run(seen: dict[str, Any]) -> None:
    branches = {"purified": 3, "uncapped": 3, "opsd": 1, "beta_opsd": 2, "student_pmi": 2, "base alone": 1}
    for name, count in branches.items():
        assert seen[f"{name} sequences"] == [count * len(LENGTHS)], name
    assert seen["diagnosed sequences"] == [2 * len(LENGTHS)] * 4  # diagnosis needs both teachers, not the base


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_diagnosed_tokens_are_spread_evenly_and_at_most_the_requested_number(
    seen: dict[str, Any], dense: list[dict[str, torch.Tensor]], count: int
) -> None:
    places, offset = [], 0
    for states, expected, length in zip(seen[f"diagnosed {count}"], dense, LENGTHS, strict=True):
        index = states.diagnosed.index
        close(states.diagnosed.privileged, expected["privileged"][index])
        close(states.diagnosed.reference, expected["reference"][index])
        places += (index + offset).tolist()
        offset += length
    assert len(places) == min(count, sum(LENGTHS))
    gaps = [after - before for before, after in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(gap >= 1 for gap in gaps)


def test_the_sample_is_the_same_each_time(seen: dict[str, Any]) -> None:
    for first, second in zip(seen["diagnosed 7"], seen["again"], strict=True):
        assert torch.equal(first.diagnosed.index, second.diagnosed.index)


def without_sharing(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """States of a model with sliding windows, twice with and without shared prefixes, and the log messages."""
    import logging

    from nemo_popsd.distillation import Target
    from nemo_popsd.training import branches
    from tests.tiny_models import build_student
    from tests.training.runs import trajectory

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    branches.logger.addHandler(handler)
    student = build_student(model)
    rows = [trajectory(number, 5) for number in range(2)]
    options: dict[str, Any] = {"token_budget": 60, "diagnosed_tokens": 0, "packed": True}
    shared = branches.FrozenBranches(student.base, student.base, Target.purified(), shared_cache_tokens=30, **options)
    separate = branches.FrozenBranches(student.base, student.base, Target.purified(), **options)
    seen = {"shared": [shared.target_states(rows) for _ in range(2)], "separate": separate.target_states(rows)}
    return {**seen, "logged": messages, "saved": shared.computed.saved}


def test_a_model_that_cannot_share_is_computed_separately_and_the_log_says_so_once(tmp_path: Path) -> None:
    (seen,) = run_ranks(without_sharing, 1, save_tiny_model(tmp_path / "hf", "olmo3"))
    for states in seen["shared"]:
        for actual, expected in zip(states, seen["separate"], strict=True):
            assert torch.equal(actual.vectors.shift, expected.vectors.shift)
    assert seen["logged"] == [
        "training.share_prefixes: each sequence is computed separately because of sliding windows"
    ]
    assert seen["saved"] == 0
