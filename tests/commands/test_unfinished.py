"""Runs with a budget of tokens per step: responses that are unfinished at its end are continued by later steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_popsd.rollout.storage import RolloutStore
from tests.model.runs import differences, metrics, rollouts, train, train_and_die

pytestmark = pytest.mark.slow

BUDGET = (
    "rollout.tokens_per_step=40",
    "rollout.batch_rows=2",
    "training.prompts_per_step=6",
    "data.train.limit=12",
)
"""Six rows of at most 12 tokens per step, two at a time. An epoch has two steps, so a step may continue a response to a
row and generate another one."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def budgeted(runs: Path) -> Path:
    assert train(runs / "budget", *BUDGET)[0][0] == 0
    return runs / "budget"


def test_unfinished_responses_are_trained_on_in_the_next_step(budgeted: Path) -> None:
    store = RolloutStore(budgeted)
    left: dict[tuple[str, int], list[int]] = {}
    ended = 0
    for step in store.steps():
        rows = {(row.row_id, row.seed): row for row in store.read(step)}
        assert set(left) < set(rows)
        for key, before in left.items():
            rollout = rows[key].rollout
            assert rollout.response[: len(before)] == before
            assert not rollout.unfinished
            if before:
                assert rollout.parts == ((step - 2, len(before)), (step - 1, len(rollout.response) - len(before)))
        left = {key: row.rollout.response for key, row in rows.items() if row.rollout.unfinished}
        assert bool(left) == (step < 4), "only the last step leaves none unfinished"
        ended += len(rows) - len(left)
    assert ended == 4 * 6, "each row is trained on once"


def test_a_killed_run_continues_unfinished_responses(budgeted: Path, runs: Path) -> None:
    """Killed in step 4, resumed after step 2: steps 3 and 4 continue the responses that steps 2 and 3 left."""
    output = runs / "budget, killed"
    train_and_die(output, *BUDGET, plan={"step": 4})
    assert train(output, *BUDGET)[0][0] == 0
    assert differences(budgeted / "checkpoints" / "final", output / "checkpoints" / "final") == []
    assert rollouts(budgeted) == rollouts(output)
    assert metrics(budgeted, "train/loss") == metrics(output, "train/loss")


def test_a_run_without_its_unfinished_responses_is_not_resumed(budgeted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(budgeted, moved)
    shutil.rmtree(moved / "checkpoints" / "final")
    (moved / "DONE").unlink()
    shutil.rmtree(moved / "rollouts" / "step-000002")
    status, printed = train(moved, *BUDGET)[0]
    assert status == 2
    assert "files of step 2 missing in" in printed


LAYOUTS = {
    "two replicas": [],
    "two stages": ["parallel.pipeline=2"],
    "two context ranks": ["parallel.context=2"],
    "two shards": ["parallel.tensor=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_on_each_row_once(runs: Path, layout: str) -> None:
    output = runs / f"budget, {layout}"
    assert [status for status, _ in train(output, *BUDGET, *LAYOUTS[layout], ranks=2)] == [0, 0]
    store = RolloutStore(output)
    assert all(store.unfinished(step) for step in (1, 2, 3))
    assert store.unfinished(4) == []
    ended = [row.seed for step in store.steps() for row in store.read(step) if not row.rollout.unfinished]
    assert len(ended) == len(set(ended)) == 4 * 6
    assert max(age for _, age in metrics(output, "train/rollout_age_max")) <= 1


def test_unfinished_responses_wait_until_their_age_bound(runs: Path) -> None:
    """The weights of several steps generate one response; a killed and resumed run ends with the same bits."""
    patient = (*BUDGET, "rollout.tokens_per_step=30", "rollout.max_age=2")
    one, other = runs / "patient", runs / "patient, killed"
    assert train(one, *patient)[0][0] == 0
    train_and_die(other, *patient, plan={"step": 4})
    assert train(other, *patient)[0][0] == 0
    store = RolloutStore(one)
    parts = [row.rollout.parts for step in store.steps() for row in store.read(step) if not row.rollout.unfinished]
    assert len(parts) == 4 * 6
    assert max(len(of_row) for of_row in parts) == 3
    assert max(age for _, age in metrics(one, "train/rollout_age_max")) == 2
    assert rollouts(one) == rollouts(other)
    assert metrics(one, "train/loss") == metrics(other, "train/loss")
    assert differences(one / "checkpoints" / "final", other / "checkpoints" / "final") == []
