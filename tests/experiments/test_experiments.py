"""The experiments: rows that do not overlap, arms that are valid configurations, and a small table of real runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.arms import ARMS, GRID, OPSD, PURIFIED, RATES, SEEDS, STUDENT_PMI, TUNING_SEEDS, Arm
from experiments.ceiling import follow, guesses
from experiments.intervals import Estimate, holm, p_text
from experiments.plan import (
    CONF,
    chosen,
    missing_neighbours,
    training_run,
    training_runs,
    tuned,
    tuning_run,
    tuning_runs,
)
from experiments.records import CURVES, Answers, Record, append, load
from experiments.results import (
    differences,
    finished,
    plot_changes,
    plot_rates,
    plot_training,
    provenance,
    rates_table,
    signal_table,
    table,
)
from experiments.rows import FILE, text, tuning_problems
from experiments.run import execute
from nemo_popsd.config.loading import load_config
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.embedded.names import asset
from nemo_popsd.testbed.contexts import sample_answers
from nemo_popsd.testbed.problems import FAMILIES, records, split_of
from nemo_popsd.testbed.templates import CONTEXTS, user_turn


@pytest.mark.slow
def test_tuning_rows_share_no_task_with_the_embedded_ones_and_contain_all_families_equally() -> None:
    assert FILE.read_text() == text()
    tuning = tuning_problems()
    tasks = [problem.task for problem in tuning]
    assert {split_of(task) for task in tasks} == {"train"}
    others = [json.loads(line)["question"] for line in asset("nemo_popsd:tiny_train").read_text().splitlines()]
    assert not set(tasks) & {question.partition(" Version: ")[0] for question in others}
    families = [problem.family for problem in tuning]
    assert {families.count(family) for family in FAMILIES} == {64}


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_is_a_configuration(arm) -> None:  # type: ignore[no-untyped-def]
    config = load_config(CONF, list(arm.overrides))
    base = load_config(CONF, [])
    changed = {"distillation"} if arm is not PURIFIED else set()  # which is the default
    assert {name for name in vars(config) if getattr(config, name) != getattr(base, name)} == changed


def _record(arm: Arm, rate: str, seed: int, right: int, phase: str = "tuning") -> Record:
    before, after = (Answers("1" * n + "0" * (10 - n), 5, 100) for n in (5, right))
    curves = {name: [1.0, 2.0, 3.0] for name in CURVES} if phase == "training" else {}
    return Record(phase, arm.name, rate, seed, before, after, 60.0, "abc", "a machine", curves)


def test_every_arm_has_the_same_rates_and_seeds_and_only_main_arms_have_ten_seeds() -> None:
    tuning = tuning_runs(ARMS)
    assert {run.rows for run in tuning} == {str(FILE)}
    assert {(run.arm, run.rate, run.seed) for run in tuning} == set(product(ARMS, GRID, TUNING_SEEDS))
    training = training_runs(dict.fromkeys((arm.name for arm in ARMS), GRID[0]), ARMS)
    assert {run.rows for run in training} == {"nemo_popsd:tiny_validation"}
    assert [sum(run.arm == arm for run in training) for arm in ARMS] == [10] * 3 + [5] * (len(ARMS) - 3)
    assert not set(TUNING_SEEDS) & set(SEEDS)
    outputs = [run.output for run in (*tuning, *training)]
    assert len(set(outputs)) == len({run.key for run in (*tuning, *training)}) == len(outputs)


def test_the_grid_of_an_arm_whose_best_rate_is_at_its_edge_is_extended() -> None:
    best = {OPSD: GRID[0], PURIFIED: GRID[2], STUDENT_PMI: GRID[-1]}
    records = [
        _record(arm, rate, seed, right=7 if rate == best[arm] else 4)
        for arm in best
        for rate in GRID
        for seed in TUNING_SEEDS
    ]
    assert chosen(records) == {arm.name: rate for arm, rate in best.items()}
    assert tuned(records)[OPSD.name] == {rate: pytest.approx(20 if rate == GRID[0] else -10) for rate in GRID}
    beyond = missing_neighbours(records, ARMS)
    assert [(run.arm, run.rate, run.seed) for run in beyond] == [
        pair for seed in TUNING_SEEDS for pair in ((OPSD, RATES[0], seed), (STUDENT_PMI, RATES[-1], seed))
    ]
    records += [_record(run.arm, run.rate, run.seed, right=8) for run in beyond]
    assert chosen(records)[OPSD.name] == RATES[0]
    assert not missing_neighbours(records, ARMS), "there are no more rates"
    incomplete = [record for record in records if (record.rate, record.seed) != (GRID[1], TUNING_SEEDS[1])]
    assert chosen(incomplete) == {}
    assert GRID[1] not in tuned(incomplete)[OPSD.name]


def test_intervals_and_p_values_use_students_t() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    # Tables of Student's t have 2.776 for 4 degrees of freedom.
    error = math.sqrt(2.5 / 5)
    assert found.half_width == pytest.approx(2.776 * error, rel=1e-3)
    assert Estimate.of([x - 3.0 + 2.776 * error for x in (1.0, 2.0, 3.0, 4.0, 5.0)]).p == pytest.approx(0.05, rel=1e-2)
    assert math.isnan(Estimate.of([1.0]).half_width)
    assert math.isnan(Estimate.of([1.0]).p)


def test_holm_adjusts_for_the_number_of_tests() -> None:
    # By hand: 4 * 0.01, max(0.04, 3 * 0.013), 2 * 0.03, max(0.06, 0.04).
    assert holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert [f"{p}" for p in holm([math.nan, 0.04])] == ["nan", "0.04"]


def test_records_are_tables(tmp_path: Path) -> None:
    records = [_record(arm, rate, seed, right=6) for arm in ARMS[:2] for rate in GRID for seed in TUNING_SEEDS]
    rights = {OPSD: (2, 3, 3), PURIFIED: (7, 6, 8)}
    records += [
        _record(arm, GRID[0], seed, right, "training")
        for arm, of_seeds in rights.items()
        for seed, right in zip(SEEDS, of_seeds, strict=False)
    ]
    records.append(_record(OPSD, GRID[1], SEEDS[0], 9, "training"))  # not the chosen rate
    for record in records:
        append(record, tmp_path / "runs.jsonl")
    assert load(tmp_path / "runs.jsonl") == records
    done = finished(records)
    assert {arm: [run.after.accuracy for run in runs] for arm, runs in done.items()} == {
        OPSD: [20, 30, 30],
        PURIFIED: [70, 60, 80],
    }
    rows = [line.strip("| ").split(" | ") for line in table(done).splitlines()]
    assert len(rows) == 2 + 1 + 2
    assert rows[2][3].startswith("50.0 ±")
    p = {arm: Estimate.of([10.0 * (right - 5) for right in of_seeds]).p for arm, of_seeds in rights.items()}
    assert [row[5] for row in rows[3:]] == [p_text(x) for x in holm(list(p.values()))]
    assert rows[4][4].startswith("+20.0 ±")
    assert rows[4][6].startswith("50.0 ±"), "5 markers in 100 tokens"
    assert "| OPSD, JSD | +43.3 ± " in differences(done)
    assert f"| **+10.0** | {' | '.join(['+10.0'] * 4)} |" in rates_table(records)
    assert len(signal_table(done).splitlines()) == 2 + 2
    assert "6 training runs with seeds 111 to 113, 6 minutes" in provenance(records[-6:])
    for plot in (plot_changes, plot_training):
        plot(done, tmp_path / "plot.svg")
        assert "</svg>" in (tmp_path / "plot.svg").read_text()
    plot_rates(records, tmp_path / "rates.svg")


def test_the_recorded_runs_are_runs_of_the_arms() -> None:
    found = load()
    assert len({record.key for record in found}) == len(found) > 0
    runs = {tuning_run(arm, rate, seed).key for arm, rate, seed in product(ARMS, RATES, TUNING_SEEDS)}
    runs |= {training_run(arm, rate, seed).key for arm, rate, seed in product(ARMS, RATES, SEEDS)}
    assert {record.key for record in found} <= runs
    lengths = {"tuning": 256 * 4, "training": 384 * 4}
    assert all(len(r.before.correct) == len(r.after.correct) == lengths[r.phase] for r in found)
    # The base's answers depend only on rows and seed.
    assert len({r.before for r in found}) == len({(r.phase, r.seed) for r in found})


@pytest.mark.slow
def test_runs_are_recorded_and_not_repeated(tmp_path: Path) -> None:
    held_out, file = tmp_path / "held_out.jsonl", tmp_path / "runs.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in records("tuning", tuning_problems()[:8])))
    more = (
        "training.steps=2",
        "training.prompts_per_step=4",
        "rollout.max_response_tokens=16",
        "evaluation.max_response_tokens=24",
        f"data.train.path={held_out}",
    )
    first, second, third = (
        replace(
            of(arm, GRID[0], 1), rows=str(held_out), output=tmp_path / name, more=(*of(arm, GRID[0], 1).more, *more)
        )
        for arm, of, name in ((OPSD, training_run, "a"), (PURIFIED, training_run, "b"), (OPSD, tuning_run, "c"))
    )
    execute([first], 1, file)
    execute([second], 1, file)  # by itself, so that it cannot reuse answers
    found = load(file)
    assert [record.key for record in found] == [first.key, second.key]
    # The base's answers do not depend on the arm, so a run may reuse those of another.
    assert found[0].before == found[1].before
    assert len(found[0].before.correct) == 8 * 4, "four answers to each problem"
    execute([first, second, third], 2, file)
    told = (third.output / "log.txt").read_text()
    assert "step 2: accuracy" in told
    assert "step 0: accuracy" not in told
    assert not (third.output / "checkpoints").exists()
    *_, last = load(file)
    assert last.key == third.key
    # Not measuring the signal changes neither weights nor answers.
    assert (last.before, last.after) == (found[0].before, found[0].after)
    assert last.curves == {}
    assert {name: len(curve) for name, curve in found[0].curves.items()} == dict.fromkeys(CURVES, 2)
    execute([first, second, third], 2, file)
    assert len(load(file)) == 3


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_are_executed(tmp_path: Path) -> None:
    runs = [
        replace(tuning_run(OPSD, rate, 1), output=tmp_path / rate, rows=str(tmp_path / "nowhere.jsonl"))
        for rate in GRID[:2]
    ]
    with pytest.raises(RuntimeError, match=f"failed: {runs[0].output}, {runs[1].output}; see log.txt there"):
        execute(runs, 1, tmp_path / "runs.jsonl")
    assert "nowhere.jsonl" in (runs[1].output / "log.txt").read_text()
    assert load(tmp_path / "runs.jsonl") == []


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
