"""The tables: valid configurations, rows that match their description, one engine, pages with the right comparisons."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from experiments.arms import ARMS, MAIN_ARMS, OPSD, PURIFIED, SEEDS, STUDENT_PMI
from experiments.intervals import Estimate, holm, p_text
from experiments.pages import page, rows_of
from experiments.plan import CONF, Run, chosen, rates_of, scaled, table_training_runs, table_tuning_runs, training_run
from experiments.ranking import recorded
from experiments.records import CURVES, Answers, Record, load
from experiments.rows import made, make, tuning_problems, with_mistakes, with_parts
from experiments.run import execute, run_table
from experiments.tables import TABLES, Table, core_hours, cost_table, count_runs
from nemo_popsd.config.loading import load_config
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.testbed.problems import records

EMBEDDED = [json.loads(line) for line in asset("nemo_popsd:tiny_train").read_text().splitlines()]


def runs_of(table: Table) -> list[Run]:
    rates = dict.fromkeys((entry.arm.name for entry in table.entries), "1.0e-4")
    return [*table_tuning_runs(table), *table_training_runs(table, rates)]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_runs_of_a_table_are_configurations(table: Table) -> None:
    runs = runs_of(table)
    assert len(runs) == sum(count_runs(table))
    assert len({run.output for run in runs}) == len(runs)
    assert len({run.key for run in runs}) == len(runs)
    assert {run.arm for run in runs} == {entry.arm for entry in table.entries}
    shown = set()
    for entry in table.entries:
        [run, *_] = [run for run in runs if run.arm is entry.arm and run.phase == "training"]
        config = load_config(CONF, run.overrides)
        shown.add(repr(replace(config, name="", output="")))
        assert config.training.prompts_per_step * config.rollout.per_prompt in (8, 32), "equal rollouts in a step"
        assert table.against(entry) in table.arms
    assert len(shown) == len(table.entries) or table.name == "long", "no two arms are the same"


def test_seeds_of_tables_are_those_of_the_main_comparison_so_that_its_runs_can_be_reused() -> None:
    for table in TABLES.values():
        assert set(table.seeds) <= set(SEEDS)
        assert not set(table.tuning_seeds) & set(SEEDS)
        assert len(table.seeds) >= 3
        assert not {arm.name for arm in ARMS} & {entry.arm.name for entry in table.entries} or table.needs
        if table.reused:
            assert table.stages == (30,)
            main = load_config(CONF, training_run(PURIFIED, "1.0e-4", SEEDS[0]).overrides)
            base = load_config(CONF, table_training_runs(table, {table.entries[0].arm.name: "1.0e-4"})[0].overrides)
            for section in ("student", "optimizer", "evaluation", "diagnosis"):
                assert getattr(main, section) == getattr(base, section)


def test_parts_of_references_are_columns() -> None:
    for row in with_parts(EMBEDDED[:50]):
        assert f"{row['sheet']} {row['stated']}" == row["reference"]
        assert row["stated"] == f"Answer {row['answer']}."
        assert "Answer" not in row["sheet"]


def test_mistakes_are_in_the_last_value_and_the_answer_of_a_share_of_the_rows() -> None:
    few, many = with_mistakes(EMBEDDED, 0.1), with_mistakes(EMBEDDED, 0.3)
    changed = [[a != b for a, b in zip(rows, EMBEDDED, strict=True)] for rows in (few, many)]
    assert [sum(some) / len(EMBEDDED) for some in changed] == pytest.approx([0.1, 0.3], abs=0.03)
    assert all(second for first, second in zip(*changed, strict=True) if first), "nested"
    for row, right in zip(many, EMBEDDED, strict=True):
        if row == right:
            continue
        answer = re.fullmatch(r".+ Answer (\d+)\.", row["reference"])[1]  # type: ignore[index]
        assert int(answer) % 10 == int(right["answer"]) % 10
        assert answer != right["answer"]
        version = re.findall(r"Version: (\w+)\.", row["question"])[0]
        assert re.findall(rf" {version} (\d+)", row["reference"])[-1] == answer
        words = zip(row["reference"].split(" "), right["reference"].split(" "), strict=True)
        assert sum(a != b for a, b in words) == 2
        assert (row["question"], row["answer"]) == (right["question"], right["answer"])


def test_made_rows_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.rows.MADE", tmp_path / "rows")
    path = make("noise-10")
    assert [json.loads(line) for line in path.read_text().splitlines()] == with_mistakes(EMBEDDED, 0.1)
    path.write_text("kept")
    assert make("noise-10").read_text() == "kept"
    with pytest.raises(KeyError):
        made("noise-20")


def test_the_cost_counts_starts_steps_and_evaluations() -> None:
    noise, anchors, long = (TABLES[name] for name in ("noise", "anchors", "long"))
    assert core_hours(noise, 120.0) == (0.0, pytest.approx(30 * 120 / 3600))
    per_step = (120 - 10 - 24) / 30
    assert core_hours(anchors, 120.0)[1] == pytest.approx(12 * (3 * (10 + 24) + 300 * per_step) / 3600)
    assert core_hours(long, 120.0)[1] == pytest.approx(12 * (10 + 12 * 110) / 3600)
    assert "noise                  0        30                  0.0       1.0" in cost_table([noise, long], 120.0)
    assert sum(sum(core_hours(table, 110.0)) for table in TABLES.values()) < 20


def answers(right: int) -> Answers:
    return Answers("1" * right + "0" * (10 - right), 5, 100)


def record(phase: str, arm: str, rate: str, seed: int, right: int, **more: object) -> Record:
    curves = {name: [1.0, 2.0] for name in CURVES} if phase == "training" else {}
    return Record(phase, arm, rate, seed, answers(5), answers(right), 60.0, "abc", "a machine", curves, **more)  # type: ignore[arg-type]


def main_records() -> list[Record]:
    best = {OPSD: "1.0e-5", PURIFIED: "1.0e-4", STUDENT_PMI: "3.0e-5"}
    rates = ("1.0e-5", "3.0e-5", "1.0e-4", "3.0e-4", "1.0e-3")
    tuning = [
        record("tuning", arm.name, rate, seed, 6 + (rate == best[arm]))
        for arm, rate, seed in product(MAIN_ARMS, rates, (1, 2, 3))
    ]
    return tuning + [record("training", a.name, best[a], s, 6 + s % 2) for a in MAIN_ARMS for s in SEEDS]


def test_an_arm_uses_the_rate_of_its_family_or_its_own() -> None:
    main = main_records()
    assert set(rates_of(TABLES["noise"], [], main).values()) == {"1.0e-5", "1.0e-4", "3.0e-5"}
    assert rates_of(TABLES["anchors"], [], main)["student-pmi-frozen-teachers"] == "1.5e-5", "half of the family's"
    assert scaled("1.0e-4", 0.5) == "5.0e-5"
    views = TABLES["views"]
    assert rates_of(views, [], main) == {}
    entry = views.entries[0]
    own = [
        record("tuning", entry.arm.name, rate, seed, 6 + (rate == entry.rates[2]))
        for rate, seed in product(entry.rates, views.tuning_seeds)
    ]
    assert rates_of(views, own, main) == {entry.arm.name: entry.rates[2]}
    assert rates_of(views, own[1:], main) == {}, "tuning is not finished"
    assert chosen(own, entry.rates, views.tuning_seeds) == {entry.arm.name: entry.rates[2]}


def test_a_page_compares_each_arm_with_its_family_at_every_stage() -> None:
    anchors, main = TABLES["anchors"], main_records()
    first, second = anchors.entries[:2]
    rates = rates_of(anchors, [], main)
    own = [
        record(
            "training",
            entry.arm.name,
            rates[entry.arm.name],
            seed,
            7 - (entry is second) * (3 + seed % 2),
            between={"30": answers(6), "100": answers(7 + seed % 2)},
            alarms={"marker_rate": -40 - seed % 3} if entry is second else {},
        )
        for entry in (first, second)
        for seed in anchors.seeds
    ]
    text = page(anchors, own, main)
    stages = text.split("## After ")[1:]
    assert [stage.split(" ")[0] for stage in stages] == ["30", "100", "300"]
    assert "| 60.0 ± 0.0 | +10.0 ± 0.0 |" in stages[0]
    after = [7 - (3 + seed % 2) for seed in anchors.seeds]
    difference = Estimate.of([10.0 * (value - 7) for value in after])
    line = f"| {second.arm.title} minus {first.arm.title} | {difference.text(sign=True)} | {p_text(difference.p)} |"
    assert line in stages[2]
    assert "marker_rate fell: 3 of 3, step 41" in text
    assert f"| {first.arm.title} | none | +20.0" in text
    assert page(anchors, [], main) == ""


def test_a_page_reuses_runs_of_the_main_comparison_with_its_seeds() -> None:
    noise, main = TABLES["noise"], main_records()
    entries = [entry for entry in noise.entries if entry.family is PURIFIED]
    own = [
        record("training", entry.arm.name, "1.0e-4", seed, 4 + seed % 3) for entry in entries for seed in noise.seeds
    ]
    done = rows_of(noise, own, main)
    assert [run.seed for run in done[PURIFIED]] == list(noise.seeds)
    assert {arm: len(runs) for arm, runs in done.items()} == dict.fromkeys(
        [*noise.reused, *(e.arm for e in entries)], 5
    )
    text = page(noise, own, main)
    values = [10.0 * (4 + seed % 3 - 6 - seed % 2) for seed in noise.seeds]
    p = holm([Estimate.of(values).p] * 2)[0]
    assert text.count(f" minus {PURIFIED.title} | {Estimate.of(values).text(sign=True)} | {p_text(p)} |") == 2
    assert recorded(done)[PURIFIED.title] == {"accuracy": pytest.approx(16.0), "markers": 0.0, "tokens": 0.0}


def test_arms_with_another_base_are_in_a_table_of_their_own() -> None:
    thinking, main = TABLES["thinking"], main_records()
    rates = {entry.arm.name: entry.rates[1] for entry in thinking.entries}
    own = [
        record("tuning", entry.arm.name, rate, seed, 6 + (rate == entry.rates[1]))
        for entry in thinking.entries
        for rate, seed in product(entry.rates, thinking.tuning_seeds)
    ]
    for entry, seed in product(thinking.entries, thinking.seeds):
        one = record("training", entry.arm.name, rates[entry.arm.name], seed, 6)
        own.append(replace(one, before=answers(2)) if "student does not" in entry.arm.title else one)
    text = page(thinking, own, main)
    assert text.count("| base |") == 2
    assert "at the edge" not in text


def test_runs_lend_answers_only_to_runs_of_the_same_base() -> None:
    rates = dict.fromkeys((entry.arm.name for entry in TABLES["thinking"].entries), "1.0e-5")
    teacher_off, *students_off = table_training_runs(TABLES["thinking"], rates)[:4]
    assert len({run.asked for run in students_off}) == 1
    assert students_off[0].asked != teacher_off.asked == training_run(OPSD, "1.0e-5", teacher_off.seed).asked


def test_a_table_of_the_larger_model_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model in runs/reasoner/model.*testbed\.reasoner --output runs/reasoner"):
        run_table(TABLES["scale"], 1, math.inf)


@pytest.mark.slow
def test_stages_are_evaluations_of_one_run(tmp_path: Path) -> None:
    rows, file = tmp_path / "rows.jsonl", tmp_path / "tables" / "runs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in records("tuning", tuning_problems()[:8])))
    small = (
        "optimizer.warmup_steps=0",
        "training.prompts_per_step=4",
        "rollout.max_response_tokens=16",
        "evaluation.max_response_tokens=24",
        f"data.train.path={rows}",
    )
    run = next(run for run in runs_of(TABLES["anchors"]) if run.arm.name.endswith("ema"))
    run = replace(run, rows=str(rows), output=tmp_path / "run", more=(*run.more, *small), stages=(1, 3))
    execute([run], 1, file, until=0.0)
    assert load(file) == [], "the time is over"
    execute([run], 1, file)
    [found] = load(file)
    assert set(found.between) == {"1"}
    assert len(found.between["1"].correct) == len(found.after.correct) == 8 * 4
    assert {len(curve) for curve in found.curves.values()} == {3}
    assert found.alarms == {}
