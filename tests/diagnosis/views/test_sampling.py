"""The student's answers on disk: which are reused, generated or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nemo_popsd.data.dataset import EvaluationPrompt
from nemo_popsd.data.records import Record
from nemo_popsd.diagnosis.views import sampling
from nemo_popsd.diagnosis.views.sampling import FILE, student_answers
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.records import SampleSettings, prompt_digest
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from tests.evaluation.scores import sample_settings
from tests.harness import run_ranks

PROMPTS = [
    EvaluationPrompt(Record(id=name, question="?", reference=None, answer="1"), [1, n]) for n, name in enumerate("abc")
]
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4, stop_token_ids=frozenset({9}))
SETTINGS = sample_settings(
    {prompt.record.id: prompt_digest(prompt.prompt) for prompt in PROMPTS},
    engine="megatron",
    max_response_tokens=4,
    stop_token_ids=(9,),
)


class Engine:
    """Responds with the prompt, the last digit of the seed and the stop token; counts requests."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, requests: list[Request], sampling: SamplingParams) -> list[Rollout]:
        self.batches.append(len(requests))
        return [Rollout([*r.prompt, r.seed % 10, 9], [], False, 0) for r in requests]


def answered(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Results and numbers of generated answers of repeated calls, and errors of refused calls."""
    import torch.distributed as dist

    student = cast(Any, SimpleNamespace(dp_group=dist.group.WORLD))

    def call(samples: int, settings: SampleSettings = SETTINGS, *, experts: bool = False) -> tuple[Any, list[int]]:
        engine = Engine()
        found = student_answers(
            student,
            engine,
            SAMPLING,
            PROMPTS,
            samples,
            settings,
            folder,
            seed=1,
            batch_rows=2,
            expert_parallel=experts,
        )
        return {key: rollout.response for key, rollout in found.items()}, engine.batches

    def refused(settings: SampleSettings) -> str:
        with pytest.raises(UserError) as raised:
            call(1, settings)
        return str(raised.value)

    found = {"first": call(1, experts=True), "more": call(2), "again": call(2), "fewer": call(1)}
    found["seed"] = refused(replace(SETTINGS, seed=7))
    found["prompt"] = refused(replace(SETTINGS, prompts={**SETTINGS.prompts, "b": "other"}))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_on_disk_are_used_and_others_refused(ranks: int, tmp_path: Path) -> None:
    results = run_ranks(answered, ranks, tmp_path)
    for found in results:
        first, more, again, fewer = (found[name][0] for name in ("first", "more", "again", "fewer"))
        assert list(first) == [("a", 0), ("b", 0), ("c", 0)]
        assert list(more) == [(name, index) for name in "abc" for index in range(2)]
        assert {key: more[key] for key in first} == first == fewer
        assert again == more
        assert found["again"][1] == found["fewer"][1] == []
        assert "seed=7 where the answers have 1;" in found["seed"]
        assert "another prompt for problem 'b'" in found["prompt"]
    # Three answers: two ranks that share experts generate two each, and one is discarded.
    assert [found["first"][1] for found in results] == ([[2, 1]] if ranks == 1 else [[2], [2]])
    assert [found["more"][1] for found in results] == ([[2, 1]] if ranks == 1 else [[2], [1]])


def test_a_damaged_file_and_one_of_another_program_are_refused(tmp_path: Path) -> None:
    sampling._write(tmp_path, SETTINGS, {("a", 0): Rollout([1, 9], [], False, 0)})
    assert sampling._read(tmp_path, SETTINGS)["a", 0].response == [1, 9]
    with (tmp_path / FILE).open("a") as file:
        file.write('{"problem": "b"}\n')
    with pytest.raises(UserError, match="damaged data"):
        sampling._read(tmp_path, SETTINGS)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / FILE).write_text("mine\n")
    with pytest.raises(UserError, match="no .nemo_popsd of a diagnosis".replace(".", r"\.")):
        sampling._read(foreign, SETTINGS)
