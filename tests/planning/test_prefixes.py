"""Prefixes that the frozen branches share, as the plan counts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_popsd.megatron.prefix.forest import PrefixForest
from nemo_popsd.planning import compute, memory
from nemo_popsd.planning.parameters import stages
from nemo_popsd.planning.prefixes import FrozenWork
from nemo_popsd.planning.settings import split_settings
from tests.planning.cases import case

MEANS = ("workload.prompt_tokens=256", "workload.reference_tokens=8192", "workload.response_tokens=1024")


@pytest.mark.parametrize(
    ("responses", "order", "share"),
    [
        (1, "question_first", 1.0),
        (1, "reference_first", 0.60),
        (4, "question_first", 0.37),
        (4, "reference_first", 0.27),
    ],
)
def test_shared_prefixes_are_counted_once(responses: int, order: str, share: float) -> None:
    plan, _ = split_settings(MEANS)
    separate = case(plan=plan)
    run = case("Qwen3-8B", f"rollout.per_prompt={responses}", f"data.templates.order={order}", plan=plan)
    computed, everything = (run.frozen_work(run.means, shared=shared).tokens for shared in (None, False))
    assert everything == responses * separate.frozen_work(separate.means).tokens
    assert computed <= share * everything
    assert run.rows == responses * separate.rows
    one, several = (compute.step(planned) for planned in (separate, run))
    assert several.frozen.linear == pytest.approx(one.frozen.linear * responses * computed / everything)
    assert several.frozen.needed <= responses * one.frozen.needed
    assert compute.prefill(run) == compute.prefill(separate), "a prompt fills the cache once"
    off = case("Qwen3-8B", f"rollout.per_prompt={responses}", "training.share_prefixes=false", plan=plan)
    assert compute.step(off).frozen.needed == pytest.approx(responses * one.frozen.needed)


def test_layouts_that_do_not_share_are_planned_so() -> None:
    for name in ("context", "expert"):
        assert not case("Qwen3-8B", "rollout.per_prompt=4", **{name: 2}).shares_prefixes
    assert case("Qwen3-8B", "rollout.per_prompt=4", tensor=2).shares_prefixes


def test_a_path_between_two_frozen_passes_is_kept() -> None:
    def kept(*settings: str) -> float:
        [stage] = stages(run_sizes, case("Qwen3-8B").layout)
        return memory.of_stage(case("Qwen3-8B", "rollout.per_prompt=4", *settings), stage).phases["frozen"][
            "kept prefix"
        ]

    run_sizes = case("Qwen3-8B").sizes
    position = 2 * 36 * 8 * 128 * 2
    assert kept("training.frozen_tokens=1000000000") == 0
    assert kept("data.max_prompt_tokens=300", "data.max_reference_tokens=700") == 1000 * position
    assert kept("training.frozen_cache_tokens=50") == 50 * position


@given(st.data())
def test_work_by_lengths_is_that_of_the_forest(data: st.DataObject) -> None:
    """Tokens, and pairs of a token and an earlier one that it attends to."""
    sizes = {name: data.draw(st.integers(1, 9)) for name in ("question", "reference", "other reference")}
    ids = {name: [number * 100 + i for i in range(size)] for number, (name, size) in enumerate(sizes.items())}
    choices = [["question"], ["question", "reference"], ["reference", "question"], ["reference"], ["other reference"]]
    contexts = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=3, unique_by=tuple))
    length, responses = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    work = FrozenWork.shared([[(name, sizes[name]) for name in context] for context in contexts], length, responses)
    prompts = [[token for name in context for token in ids[name]] for context in contexts]
    sequences = [
        [*prompt, *(1000 + 100 * number + 10 * index for index in range(length))]
        for prompt in prompts
        for number in range(responses)
    ]
    forest = PrefixForest.of(sequences)
    assert work.tokens == forest.tokens
    pairs = sum(sum(range(node.begin, node.end)) for node in forest.nodes)
    assert (work.squares - work.tokens) / 2 + work.earlier == pairs
    kept = max(node.begin for node in forest.nodes)
    assert work.kept == kept if responses > 1 else work.kept >= kept
