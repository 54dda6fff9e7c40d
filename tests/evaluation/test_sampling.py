from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.data.records import Record
from nemo_popsd.evaluation.sampling import sample_outcomes
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from tests.data.small import tokenizer

SAMPLING = SamplingParams(1.0, 1.0, 0, max_response_tokens=64, stop_token_ids=frozenset())


class Engine:
    """Answers `\\boxed{...}` with the prompt's length; every second response is cut."""

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        assert sampling is SAMPLING
        self.calls.append(list(requests))
        rollouts = []
        for number, request in enumerate(requests):
            text = f"Wait. \\boxed{{{len(request.prompt)}}}<end>"
            ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
            rollouts.append(Rollout(ids, [0.0] * len(ids), cut=number % 2 == 1, weights_version=0))
        return rollouts


def prompts(count: int) -> list[EvaluationPrompt]:
    return [
        EvaluationPrompt(Record(id=f"p{number}", question="q", reference=None, answer="3"), [7] * (2 + number))
        for number in range(count)
    ]


def config(samples: int = 1, seed: int = 1234) -> PopsdConfig:
    made = PopsdConfig(seed=seed)
    made.evaluation.samples_per_problem = samples
    return made


def seeds(count: int, settings: PopsdConfig) -> dict[tuple[int, int], int]:
    """Seed of each (prompt length, place among its samples)."""
    engine = Engine()
    sample_outcomes(prompts(count), engine, SAMPLING, tokenizer(), settings)
    found: dict[tuple[int, int], int] = {}
    for request in engine.calls[0]:
        place = sum(length == len(request.prompt) for length, _ in found)
        found[len(request.prompt), place] = request.seed
    return found


def test_each_problem_is_answered_as_often_as_asked_and_scored() -> None:
    engine = Engine()
    outcomes = sample_outcomes(prompts(3), engine, SAMPLING, tokenizer(), config(samples=2))
    assert [outcome.problem_id for outcome in outcomes] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert [outcome.correct for outcome in outcomes] == [False, False, True, True, False, False]
    assert [outcome.cut for outcome in outcomes] == [False, True] * 3
    assert [outcome.markers["Wait"] for outcome in outcomes] == [1] * 6
    assert len(engine.calls) == 1  # all at once, so that the engine can fill its batches
    expected = len(tokenizer()("Wait. \\boxed{2}<end>", add_special_tokens=False)["input_ids"])
    assert {outcome.tokens for outcome in outcomes} == {expected}


def test_random_numbers_are_the_same_before_and_after_and_in_any_layout() -> None:
    settings = config(samples=3)
    assert seeds(4, settings) == seeds(4, settings)
    # A rank with fewer problems draws the same for those it has, and so does a run with fewer samples.
    assert seeds(2, settings).items() <= seeds(4, settings).items()
    assert seeds(4, config(samples=2)).items() <= seeds(4, settings).items()


def test_every_sample_has_random_numbers_of_its_own() -> None:
    found = seeds(4, config(samples=3))
    assert len(set(found.values())) == 12
    assert not set(found.values()) & set(seeds(4, config(samples=3, seed=1)).values())


def test_no_prompts_is_no_outcomes() -> None:
    assert sample_outcomes([], Engine(), SAMPLING, tokenizer(), config()) == []


def test_a_prompt_without_an_answer_is_a_defect() -> None:
    (prompt,) = prompts(1)
    with pytest.raises(AssertionError):
        sample_outcomes(
            [EvaluationPrompt(Record(id="x", question="q", reference=None, answer=None), prompt.prompt)],
            Engine(),
            SAMPLING,
            tokenizer(),
            config(),
        )
