from __future__ import annotations

from collections.abc import Sequence

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.data.records import Record
from nemo_popsd.evaluation.records import Sample
from nemo_popsd.evaluation.sampling import generate_samples, missing_samples
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from tests.data.small import tokenizer

SAMPLING = SamplingParams(1.0, 1.0, 0, max_response_tokens=64, stop_token_ids=frozenset())


class Engine:
    """Responds with the length of the prompt; every second response is truncated before its stop token."""

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        assert sampling is SAMPLING
        self.calls.append(list(requests))
        rollouts = []
        for number, request in enumerate(requests):
            cut = number % 2 == 1
            text = f"<user> \\boxed{{{len(request.prompt)}}}" + ("" if cut else "<end>")
            ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
            rollouts.append(Rollout(ids, [0.0] * len(ids), truncated=cut, weights_version=0))
        return rollouts


def prompts(count: int) -> list[EvaluationPrompt]:
    return [
        EvaluationPrompt(Record(id=f"p{number}", question="q", reference=None, answer="3"), [7] * (2 + number))
        for number in range(count)
    ]


def seeds(count: int, samples: int, seed: int = 1234) -> dict[tuple[str, int], int]:
    requests = missing_samples(prompts(count), samples)
    return {(request.prompt.record.id, request.sample): request.seed(seed) for request in requests}


def test_existing_samples_are_not_generated_again() -> None:
    existing = {("p0", 1), ("p2", 0), ("gone", 0)}
    missing = missing_samples(prompts(3), 2, existing)
    identities = [(request.prompt.record.id, request.sample) for request in missing]
    assert identities == [("p0", 0), ("p1", 0), ("p1", 1), ("p2", 1)]
    assert missing_samples(prompts(3), 1, {("p0", 0), ("p1", 0), ("p2", 0)}) == []


def test_samples_record_the_responses() -> None:
    engine = Engine()
    samples = generate_samples(missing_samples(prompts(2), 2), engine, SAMPLING, tokenizer(), seed=1)
    assert len(engine.calls) == 1  # all at once, so that the engine can fill its batches
    length = len("<user>") - 5 + len(" \\boxed{2}")  # the special token counts as one
    assert samples == [
        Sample("p0", 0, "<user> \\boxed{2}", length + 1, truncated=False),
        Sample("p0", 1, "<user> \\boxed{2}", length, truncated=True),
        Sample("p1", 0, "<user> \\boxed{3}", length + 1, truncated=False),
        Sample("p1", 1, "<user> \\boxed{3}", length, truncated=True),
    ]
    assert [request.seed for request in engine.calls[0]] == list(seeds(2, 2, seed=1).values())
    assert generate_samples([], engine, SAMPLING, tokenizer(), seed=1) == []


def test_seeds_do_not_depend_on_step_or_layout() -> None:
    # Fewer problems on a rank, or fewer samples in a run, do not change the seeds of the others.
    assert seeds(2, 3).items() <= seeds(4, 3).items()
    assert seeds(4, 2).items() <= seeds(4, 3).items()


def test_every_sample_has_its_own_seed() -> None:
    assert len(set(seeds(4, 3).values())) == 12
    assert not set(seeds(4, 3).values()) & set(seeds(4, 3, seed=1).values())
