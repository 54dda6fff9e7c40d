"""Which weights generate the rollouts of a step, with the real engine; vLLM: see tests/commands/test_overlap.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

STEPS, ROWS = 4, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "hf")


@dataclass
class FinishedRollouts:
    """Responses that were generated when they were submitted."""

    rollouts: list[Rollout]

    def result(self) -> list[Rollout]:
        return self.rollouts


class BesideEngine:
    """An engine like a server: submitted requests use the weights of that moment, whenever the result is read."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.submitted = 0
        self.generated = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        self.generated += 1
        return self._engine.generate(requests, sampling)

    def submit(self, requests: Sequence[Request], sampling: SamplingParams) -> FinishedRollouts:
        self.submitted += 1
        return FinishedRollouts(self._engine.generate(requests, sampling))


def rows_of(number: int, rank: int, ranks: int) -> list[Any]:
    """This rank's share of the rows of step `number`."""
    from tests.training.runs import row

    share = ROWS // ranks
    first = number * ROWS + rank * share
    return [row(index) for index in range(first, first + share)]


def train(rank: int, world_size: int, model: Path, output: Path, overlap: bool) -> dict[str, Any]:
    """Four steps, and what the weights at the start of each generate for it and for the next one."""
    from nemo_popsd.rollout.engine import row_seed
    from nemo_popsd.training.rollouts import TrainingRows
    from tests.training.runs import settings, start

    run = start(model, settings(rollout={"overlap": overlap}, training={"steps": STEPS}, optimizer={"lr": 1e-1}))
    engine = BesideEngine(run.engine())
    store = RolloutStore(output)
    rows = TrainingRows(lambda name: rows_of(0, 0, 1)[0], lambda number: rows_of(number, rank, world_size))
    step = run.on_policy_step(engine, store=store, rows=rows)
    seen: dict[str, Any] = {"metrics": [], "current": [], "ahead": []}
    for number in range(1, STEPS + 1):
        for name, of in (("current", number), ("ahead", number + 1)):
            requests = [
                Request(r.contexts.student, row_seed(1234, "train", of, r.record.id))
                for r in rows_of(of, rank, world_size)
            ]
            seen[name].append([r.response for r in run.engine().generate(requests, run.sampling)])
        seen["metrics"].append(step(number, rows_of(number, rank, world_size), run.optimizer, run.update))
    seen["calls"] = engine.generated, engine.submitted
    return seen


def ages(seen: dict[str, Any]) -> list[tuple[float, float]]:
    return [(metrics.rollout_age, metrics.rollout_age_max) for metrics in seen["metrics"]]


def stored(output: Path, part: int) -> list[list[list[int]]]:
    """Responses of a replica, by step."""
    return [
        [row.rollout.response for row in RolloutStore(output).read(step)][part * ROWS // 2 :][: ROWS // 2]
        for step in range(1, STEPS + 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_the_next_step_is_generated_by_the_weights_that_this_one_starts_with(
    model: Path, tmp_path: Path, overlap: bool
) -> None:
    for rank, seen in enumerate(run_ranks(train, 2, model, tmp_path, overlap)):
        trained_on = stored(tmp_path, rank)
        assert seen["current"][1:] != seen["ahead"][:-1], "a step changes the responses"
        if overlap:
            assert trained_on == [seen["current"][0], *seen["ahead"][:-1]]
            assert ages(seen) == [(0, 0)] + [(1, 1)] * (STEPS - 1)
            assert seen["calls"] == (1, STEPS - 1), "the last step generates nothing ahead"
        else:
            assert trained_on == seen["current"]
            assert ages(seen) == [(0, 0)] * STEPS
            assert seen["calls"] == (STEPS, 0)


def train_on_several(rank: int, world_size: int, model: Path, output: Path, share: str) -> dict[str, Any]:
    """Two steps of two updates with three responses to each of four questions; the responses of the first again."""
    from tests.training.runs import settings, sibling, start

    sections = {"rollout": {"per_prompt": 3}, "training": {"share_prefixes": share, "updates_per_step": 2}}
    run = start(model, settings(**sections))  # type: ignore[arg-type]
    engine, store = BesideEngine(run.engine()), RolloutStore(output)
    share_of_rank = ROWS // world_size
    rows = [sibling(2 * (rank * share_of_rank + index)) for index in range(share_of_rank)]
    metrics = []
    for number in (2, 3):
        run.steps = number - 1
        metrics.append(run.on_policy_step(engine, store=store)(number, rows, run.optimizer, run.update))
    run.steps = 1
    again = [t.rollout for t in run.on_policy_step(engine, store=store)._rollouts.of(2, rows)]
    return {"metrics": metrics, "again": again, "generated": engine.generated}


@pytest.mark.slow
def test_several_responses_to_each_question(model: Path, tmp_path: Path) -> None:
    from nemo_popsd.rollout.engine import row_seed

    runs = {
        (size, share): run_ranks(train_on_several, size, model, tmp_path / f"{size}{share}", share)
        for size, share in ((1, "false"), (2, "true"))
    }
    [expected] = runs[1, "false"]
    responses = {}
    for (size, share), ranks in runs.items():
        lines = list(RolloutStore(tmp_path / f"{size}{share}").read(2))
        assert len(lines) == 3 * ROWS
        for place, line in enumerate(lines):
            assert line.seed == row_seed(1234, "train", 2, line.row_id) + place % 3, "by row and number alone"
            assert line.prompt == lines[place - place % 3].prompt
        responses[size, share] = [line.rollout.response for line in lines]
        assert len({tuple(response) for response in responses[size, share][:3]}) > 1
        for seen in ranks:
            assert seen["generated"] == 2, "the first step's are read from the disk"
            for measured, wanted in zip(seen["metrics"], expected["metrics"], strict=True):
                assert measured.loss == pytest.approx(wanted.loss, rel=1e-5)
                assert measured.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
                assert measured.response_diversity == pytest.approx(wanted.response_diversity)
                assert measured.accuracy is None
                assert (measured.frozen_tokens_saved > 0) == (share == "true")
                saved = measured.frozen_tokens + measured.frozen_tokens_saved
                assert saved == wanted.frozen_tokens
        trained = [rollout.response for seen in ranks for rollout in seen["again"]]
        assert trained == responses[size, share]
    assert len({str(of_run) for of_run in responses.values()}) == 1, "in every layout"


def take_up(rank: int, world_size: int, model: Path, output: Path, bound: int, stored_by: int) -> dict[str, Any]:
    """Step 4 of a run whose rollouts of that step are stored, generated by the weights of step `stored_by`."""
    from nemo_popsd.rollout.engine import row_seed
    from nemo_popsd.rollout.storage import StoredRollout
    from nemo_popsd.training.rollouts import TrainingRows
    from tests.training.runs import response, settings, start

    run = start(model, settings(rollout={"overlap": True, "max_age": bound}, training={"steps": STEPS}))
    run.steps = STEPS - 1
    store, rows = RolloutStore(output), rows_of(STEPS, 0, 1)
    lines = [
        StoredRollout(
            row.record.id,
            row_seed(1234, "train", STEPS, row.record.id),
            list(row.contexts.student),
            Rollout(response(number, 5), [-1.0] * 5, True, stored_by),
        )
        for number, row in enumerate(rows)
    ]
    store.write(STEPS, lines, part=0, parts=1)
    engine = BesideEngine(run.engine())
    training_rows = TrainingRows(lambda name: rows[0], lambda number: rows_of(number, 0, 1))
    step = run.on_policy_step(engine, store=store, rows=training_rows)
    metrics = step(STEPS, rows, run.optimizer, run.update)
    return {"age": metrics.rollout_age_max, "generated": engine.generated}


@pytest.mark.parametrize(
    ("bound", "stored_by", "expected"),
    [(1, 3, (0, 0)), (1, 2, (1, 0)), (1, 1, (0, 1)), (2, 1, (2, 0)), (2, 0, (0, 1))],
)
def test_stored_rollouts_are_trained_on_unless_they_are_too_old(
    model: Path, tmp_path: Path, bound: int, stored_by: int, expected: tuple[int, int]
) -> None:
    (seen,) = run_ranks(take_up, 1, model, tmp_path, bound, stored_by)
    assert (seen["age"], seen["generated"]) == expected


def train_on_old(rank: int, world_size: int, model: Path) -> None:
    """An engine whose responses have an older version of the weights than requested."""
    from tests.training.runs import settings, start

    run = start(model, settings())
    engine = run.engine()
    generate = engine.generate
    engine.generate = lambda *arguments: [replace(r, weights_version=-1) for r in generate(*arguments)]  # type: ignore
    run.on_policy_step(engine)(1, rows_of(1, 0, 1), run.optimizer, run.update)


def test_rollouts_that_are_too_old_are_not_trained_on(model: Path) -> None:
    with pytest.raises(AssertionError, match="step 1 has rollouts by weights that are 1 steps old"):
        run_ranks(train_on_old, 1, model)
