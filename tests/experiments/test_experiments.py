"""The experiments: rows that do not overlap, arms that are valid configurations, and a small table of real runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.arms import ARMS, OPSD, PURIFIED, RATES
from experiments.ceiling import follow, guesses
from experiments.results import Estimate, accuracy, markers, scores, signal_table, table
from experiments.rows import HARD, drawn, rows, tuning_problems, write
from experiments.run import CONF, Run, execute, training_runs, tuning_runs
from nemo_popsd.config.loading import load_config
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.testbed.contexts import sample_answers
from nemo_popsd.testbed.problems import FAMILIES, split_of
from nemo_popsd.testbed.templates import CONTEXTS, user_turn


def _task(row: dict[str, str]) -> str:
    """The question without its version, which pre-training and the files must not share."""
    return row["question"].partition(" Version: ")[0]


@pytest.mark.slow
def test_files_share_no_task_and_contain_all_families_equally(tmp_path: Path) -> None:
    write(tmp_path)
    files = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert {name: len(found) for name, found in files.items()} == {"train": 1600, "tuning": 256, "held_out": 512}
    tasks = [_task(row) for found in files.values() for row in found]
    assert len(set(tasks)) == len(tasks)
    assert len({row["id"] for found in files.values() for row in found}) == len(tasks)
    for name, found in files.items():
        assert {split_of(_task(row)) for row in found} == {"validation" if name == "held_out" else "train"}
        of_family = [row["id"].split("/")[1] for row in found]
        assert {of_family.count(family) for family in FAMILIES} == {len(found) // len(FAMILIES)}
    assert [p.question for p in tuning_problems()] == [row["question"] for row in files["tuning"]]
    assert {len(problem.steps) for problem in drawn("validation", 40, HARD)} == {6, 7}


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_is_a_configuration(arm) -> None:  # type: ignore[no-untyped-def]
    config = load_config(CONF, list(arm.overrides))
    base = load_config(CONF, [])
    changed = {"distillation"} if arm is not PURIFIED else set()  # which is the default
    assert {name for name in vars(config) if getattr(config, name) != getattr(base, name)} == changed


def test_every_arm_has_the_same_rates_and_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("experiments.run.CHOSEN", tmp_path / "rates.json")
    (tmp_path / "rates.json").write_text(json.dumps({arm.name: RATES[0] for arm in ARMS}))
    assert {run.rows.name for run in tuning_runs()} == {"tuning.jsonl"}
    assert [sum(run.arm == arm for run in tuning_runs()) for arm in ARMS] == [len(RATES)] * len(ARMS)
    assert {run.rows.name for run in training_runs()} == {"held_out.jsonl"}
    assert [sum(run.arm == arm for run in training_runs()) for arm in ARMS] == [5] * len(ARMS)
    outputs = [run.output for run in (*tuning_runs(), *training_runs())]
    assert len(set(outputs)) == len(outputs)


def test_intervals_use_students_t() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    # Tables of Student's t have 2.776 for 4 degrees of freedom.
    assert found.half_width == pytest.approx(
        2.776 * math.sqrt(2.5 / 5), rel=1e-3
    )  # tables of Student's t, 4 degrees of freedom
    assert math.isnan(Estimate.of([1.0]).half_width)


@pytest.mark.slow
def test_runs_make_a_table(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    some = rows(drawn("validation", 8, HARD), "hard") + rows(tuning_problems()[:8], "usual")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in some))
    more = (
        "student.source=nemo_popsd:tiny_reasoner",
        "training.steps=2",
        "training.prompts_per_step=4",
        "rollout.max_response_tokens=16",
        "evaluation.max_response_tokens=24",
        f"data.train.path={held_out}",
    )
    done = {
        arm: [Run(arm, seed, RATES[0], tmp_path / arm.name / str(seed), held_out, more) for seed in seeds]
        for arm, seeds in ((OPSD, [1]), (PURIFIED, [1, 2]))
    }
    runs = [run for of_arm in done.values() for run in of_arm]
    for of_arm in done.values():  # each separately, so that no run can reuse answers
        execute(of_arm, workers=1)
    assert all(run.finished for run in runs)
    # The base's answers do not depend on the arm, so a run may reuse those of another.
    first, second = (scores(of_arm[0], "before") for of_arm in done.values())
    assert first == second
    again = replace(done[OPSD][0], output=tmp_path / "again")
    execute([*runs, again], workers=1)
    told = (again.output / "log.txt").read_text()
    assert "step 2: accuracy" in told
    assert "step 0: accuracy" not in told
    assert scores(again, "before") == first
    assert scores(again, "after") == scores(done[OPSD][0], "after")
    lines = table(done).splitlines()
    assert len(lines) == 2 + 1 + 2
    assert f"{accuracy('hard')(first):.1f}" == "0.0"  # truncated after 24 tokens
    mean = Estimate.of([markers(scores(run, "after")) for run in done[PURIFIED]]).text()
    assert mean in lines[-1]
    assert len(signal_table(done).splitlines()) == 2 + 2
    execute(runs, workers=1)  # all runs are finished


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_are_executed(tmp_path: Path) -> None:
    runs = [Run(OPSD, 1, rate, tmp_path / rate, tmp_path / "nowhere.jsonl") for rate in RATES]
    with pytest.raises(RuntimeError, match=f"failed: {runs[0].output}, {runs[1].output}; see log.txt there"):
        execute(runs, workers=2)
    assert "nowhere.jsonl" in (runs[1].output / "log.txt").read_text()


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experiments.premise import MODEL

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), [("base", 0), ("privileged", 1), ("reference", 2)])
def test_following_a_sharp_target_is_greedy_decoding_from_its_context(
    base: tuple[Any, Any], family: str, place: int
) -> None:
    """log P = 1e5 log π: all probability on the most likely token; compared with plain transformers."""
    chosen, context = tuning_problems()[:6], CONTEXTS[place]
    target = Target(**{family: 1e5})
    followed = follow(*base, chosen, target, CONTEXTS, borrow=False)
    turns = [user_turn(context, problem.question, problem.reference) for problem in chosen]
    greedy = sample_answers(*base, turns, temperature=0.0)
    assert followed == greedy


@pytest.mark.slow
def test_a_borrowed_reference_is_the_next_problems(base: tuple[Any, Any]) -> None:
    chosen = tuning_problems()[:4]
    followed = follow(*base, chosen, Target(privileged=1e5), CONTEXTS, borrow=True)
    references = [chosen[(number + 1) % 4].reference for number in range(4)]
    turns = [user_turn(CONTEXTS[1], p.question, r) for p, r in zip(chosen, references, strict=True)]
    assert followed == sample_answers(*base, turns, temperature=0.0)


@pytest.mark.slow
def test_a_target_equal_to_the_base_has_its_guesses(base: tuple[Any, Any]) -> None:
    found = guesses(*base, tuning_problems()[:4], Target.purified(beta=1e9))
    assert found["target"] == pytest.approx(found["question"], rel=1e-4)
    assert 0.3 < found["question"] < 1
    assert found["question+reference"] > found["reference"] + 0.05, "what a gain of purification stands on"


@pytest.mark.slow
def test_the_cost_of_a_step_is_the_sum_of_its_parts() -> None:
    words = ["training.prompts_per_step=4", "rollout.max_response_tokens=16", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cost", str(CONF), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parts = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in done.stdout.splitlines() if "|" in line
    }
    opsd, purified = ([float(cell.strip(" |")) for cell in parts[name]] for name in ("OPSD", "Purified"))
    assert opsd[0] == purified[0], "the same rollouts"
    for *seconds, step in (opsd, purified):
        assert step > 0
        assert abs(sum(seconds) - step) < 0.03, "each part is rounded to 0.01"
    assert re.search(r"Purified takes \+\d+\.\d % of OPSD's step", done.stdout)
