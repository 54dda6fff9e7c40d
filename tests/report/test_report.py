"""The content of a report: verdicts by their rules, the order of samples, and notes about missing data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.observability.metrics import DECLARED, MismatchMetrics, StepMetrics
from nemo_popsd.report import verdicts, write_diagnosis_page, write_report
from nemo_popsd.report.groups import told_apart
from nemo_popsd.report.rollouts import answer_pairs, is_truncated, pair_cards
from nemo_popsd.report.run import read_run
from nemo_popsd.report.sections import CURVES, DECOMPOSITION_CURVES, PHASES
from tests.report.runs_on_disk import diagnosis, validation, write_run, write_samples


def with_validations(directory: Path, *values: dict[str, float]) -> Path:
    """A run with these validations in its metrics, ten steps apart."""
    write_run(directory)
    lines = [{"step": 10 * index, **of} for index, of in enumerate(values)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (0.70, "rose: +10.0 points [+4.5, +15.5]"),
        (0.50, "fell: −10.0 points [−15.5, −4.5]"),
        (0.63, "no significant change: +3.0 points [−2.5, +8.5]"),
    ],
)
def test_the_accuracy_changed_if_its_interval_excludes_0(tmp_path: Path, after: float, expected: str) -> None:
    run = read_run(with_validations(tmp_path, validation(0.6), validation(after)))
    assert verdicts.accuracy_verdict(run) == expected


def test_accuracy_without_an_interval_or_without_an_end(tmp_path: Path) -> None:
    bare = {"validation/accuracy": 0.5}
    assert "without an interval" in verdicts.accuracy_verdict(read_run(with_validations(tmp_path / "a", bare, bare)))
    assert verdicts.accuracy_verdict(read_run(with_validations(tmp_path / "b", bare))) == "not measured"


@pytest.mark.parametrize(
    ("markers", "tokens", "expected"),
    [(52, 118, "kept thinking"), (40, 110, "thinks less"), (50, 90, "thinks less"), (60, 112, "thinks more")],
)
def test_thinking_is_kept_within_a_tenth(tmp_path: Path, markers: float, tokens: float, expected: str) -> None:
    after = {**validation(0.6), "validation/markers_per_1000_tokens": markers, "validation/mean_tokens": tokens}
    run = read_run(with_validations(tmp_path, validation(0.6), after))
    assert verdicts.thinking_verdict(run).startswith(expected)


def test_the_target_raises_or_lowers_the_markers() -> None:
    summary = diagnosis("x").summary
    assert verdicts.target_verdict(summary).startswith("lowers the markers: −10 %")
    summary["push"]["markers"]["Wait"]["push"]["target"] = 1.0
    assert verdicts.target_verdict(summary).startswith("raises the markers: +20 %")
    summary["push"]["markers"]["Wait"]["push"]["target"] = 0.01
    assert verdicts.target_verdict(summary).startswith("does not change")
    summary["push"]["markers"] = {"Let me think": None}
    assert "no marker is a single token" in verdicts.target_verdict(summary)


def test_the_last_line_of_a_step_counts_and_partial_lines_are_skipped(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = ['{"step": 1, "train/loss": 1.0}', '{"step": 2, "train/loss": "nan"}', '{"step": 1, "train/loss": 3.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "train/lo']))
    (tmp_path / "diagnosis" / "after" / "rollouts.jsonl").write_text("")
    run = read_run(tmp_path)
    (first, (step, second)) = run.training["loss"]
    assert first == (1.0, 3.0)
    assert step == 2
    assert second != second
    assert list(run.diagnoses) == ["before"]
    assert "not a number" not in write_report([tmp_path], tmp_path / "r.html").read_text()


def test_stored_samples_take_precedence_over_metrics_and_determine_the_interval_of_a_change(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_samples(tmp_path, 0, {"a": True, "b": True, "c": False, "d": True})
    write_samples(tmp_path, 6, {"a": True, "b": False, "c": True, "d": True})
    run = read_run(tmp_path)
    assert run.before is not None
    assert run.before.values["accuracy"] == 0.75
    assert run.before.values["marker_rates.Wait"] == 1000 / 7.5
    interval = verdicts.estimate(run.before, "accuracy", 100.0)
    assert interval is not None
    assert (interval.low, interval.high) == tuple(100 * edge for edge in run.before.intervals["accuracy"])
    change = verdicts.change(run, "accuracy", 100.0)
    assert change is not None
    assert change.value == 0
    assert change == verdicts.Interval(0.0, *(100 * edge for edge in verdicts.paired_changes(run)["accuracy"].interval))
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "pass@2, %" in page
    assert '<span class="inner">Wait</span>' in page
    assert "Always 0: Maybe, " in page
    (tmp_path / "validation" / "step-000000" / "scores.jsonl").unlink()
    alone = read_run(tmp_path)
    assert verdicts.paired_changes(alone) == {}
    assert verdicts.change(alone, "accuracy") is not None


def test_answers_that_changed_come_first_alternating(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_samples(tmp_path, 0, {"same": True, "lost 1": True, "lost 2": True, "won": False, "lost 3": True})
    write_samples(tmp_path, 6, {"same": True, "lost 1": False, "lost 2": False, "won": True, "lost 3": False})
    pairs, origin = answer_pairs(read_run(tmp_path), 4)
    assert [pair.row for pair in pairs] == ["lost 1", "won", "lost 2", "lost 3"]
    assert "of 5, 3 became wrong and 1 became right" in origin
    html = pair_cards(pairs[1], ["Wait"])
    assert html.index('class="badge wrong"') < html.index('class="badge right"')
    assert html.count("<mark>Wait</mark>, won.") == 2
    assert "expected 4" in html


def test_without_samples_the_rollouts_of_the_diagnoses_are_shown(tmp_path: Path) -> None:
    pairs, origin = answer_pairs(read_run(write_run(tmp_path)), 4)
    assert len(pairs) == 2
    assert pairs[0].after is not None
    assert "diagnoses" in origin


def test_truncated_responses_are_read_under_the_current_and_the_older_key(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary, responses = (tmp_path / "diagnosis" / "before" / name for name in ("summary.json", "rollouts.jsonl"))
    present, _ = answer_pairs(read_run(tmp_path), 4)
    assert [pair.before.truncated for pair in present if pair.before] == [False, True]
    responses.write_text(responses.read_text().replace('"truncated"', '"cut"'))
    older = json.loads(summary.read_text())
    del older["sum"], older["rollouts_sha256"]  # older diagnoses have neither
    summary.write_text(json.dumps(older))
    assert answer_pairs(read_run(tmp_path), 4)[0] == present


def test_missing_data_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: young\n")
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    for text in (
        "Accuracy and thinking were not measured: set data.validation.path.",
        "The target was not diagnosed: set diagnosis.in_training=true.",
        "No step was trained",
        "The run has no stored answers",
        "No step was timed",
    ):
        assert page.count(text) == 1
    assert "not measured</p>" not in page


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", name="Purified")
    second = write_run(tmp_path / "b", name="OPSD", after=0.3)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("family: purified", "family: opsd"))
    page = write_report([first, second], tmp_path / "pages" / "r.html").read_text()
    assert "<title>Purified vs. OPSD</title>" in page
    assert "fell: " in page
    differing = page[page.index("Settings that differ") :]
    assert "distillation.target.family" in differing[: differing.index("</table>")]
    assert "optimizer.lr" not in differing[: differing.index("</table>")]
    assert 'href="../a/diagnosis/before/index.html"' in page


def test_runs_of_one_name_are_labelled_by_their_differences(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, name="run") for name in "abc"]
    for run, line in zip(runs, ("lr: 1.0e-06", "lr: 0.0001", "lr: 0.0003"), strict=True):
        config = run / "config.yaml"
        config.write_text(re.sub(r"\blr: \S+", line, config.read_text(), count=1))
    other = write_run(tmp_path / "d", name="other")
    labelled = told_apart([read_run(run) for run in (*runs, other)])
    assert [run.name for run in labelled] == ["run (lr=1e-06)", "run (lr=0.0001)", "run (lr=0.0003)", "other"]
    assert [run.name for run in told_apart([read_run(runs[0])] * 2)] == ["run", "run"], "one run, given twice"
    again = write_run(tmp_path / "e", name="other")
    assert [run.name for run in told_apart([read_run(other), read_run(again)])] == ["other (d)", "other (e)"]
    seeds = [write_run(tmp_path / f"s{seed}", name="seeded") for seed in (1, 2)]
    for seed, run in enumerate(seeds, start=1):
        config = run / "config.yaml"
        config.write_text(re.sub(r"^seed: \d+", f"seed: {seed}", config.read_text(), flags=re.MULTILINE))
    assert [run.name for run in told_apart([read_run(run) for run in seeds])] == ["seeded (seed=1)", "seeded (seed=2)"]


def test_flipped_problems_are_listed_with_both_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_samples(run, 0, {"lost": True, "won": False, "kept": True}, text="before {}")
    write_samples(run, 6, {"lost": False, "won": True, "kept": True}, text="after {}")
    page = write_report([run], tmp_path / "r.html").read_text()
    start, end = (page.index(f"1 problem became {what}") for what in ("wrong (right → wrong)", "right (wrong → right)"))
    lost = page[start:end]
    assert lost.index("before lost") < lost.index("after lost")
    assert "won" not in lost
    assert "kept" not in page[start : page.index('id="throughput"')]


def test_metrics_that_never_change_are_folded(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (1, 2, 3):
            file.write(json.dumps({"step": step, "train/same": 4.0, "train/other": float(step)}) + "\n")
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "<h3>other</h3>" in page
    assert "<h3>same</h3>" not in page
    folded = page[page.index("that did not change</summary>") :]
    assert '<th scope="row">same</th><td>4.00</td>' in folded[: folded.index("</details>")]


def test_trackers_and_truncated_references_are_in_the_header(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "data.json").write_text('{"references_truncated": 3, "rows_kept": 40}')
    ids = {"wandb": "a1", "wandb_link": "https://wandb.ai/x/runs/a1", "mlflow": "b2", "mlflow_link": "javascript:x"}
    (run / "trackers.json").write_text(json.dumps(ids))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "references truncated <b>3 of 40 (data.max_reference_tokens)</b>" in page
    assert 'W&amp;B <a href="https://wandb.ai/x/runs/a1" rel="noreferrer">a1</a>' in page
    assert "MLflow <b>b2</b>" in page
    assert "javascript" not in page
    (run / "trackers.json").write_text("{")
    assert "W&amp;B" not in write_report([run], tmp_path / "r.html").read_text()


def test_every_listed_metric_exists() -> None:
    placed = {*CURVES, *DECOMPOSITION_CURVES, *PHASES, "tokens_per_second"}
    mismatch = {f"mismatch_{name}" for name in MismatchMetrics.__dataclass_fields__}
    assert placed <= {*StepMetrics.__dataclass_fields__, *mismatch, *(statistic.name for statistic in DECLARED)}


def test_the_cost_of_a_step_is_listed_with_what_was_not_measured(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "12.5 TFLOP/s per GPU" in page
    assert "Not measured here: response tokens per second and gpu, share of the peak flop/s" in page
    assert "<h3>cost/tflops</h3>" not in page


def test_an_alarm_is_on_the_time_axis_of_its_quantity_and_in_a_list(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "guard/marker_rate": -3.0}\n')
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    text = "run, step 5: fell: the change began after step 3"
    assert f"<li>Epistemic markers: {text}</li>" in page
    [event] = re.findall(r'<path class="event s1" d="M[\d.]+ 10V[\d.]+"><title>([^<]*)</title></path>', page)
    assert event == text
    assert "<h3>guard/marker_rate</h3>" not in page


def test_an_unlisted_metric_is_drawn_under_its_name(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/brand_new": 4.0}\n')
    assert "<h3>brand_new</h3>" in write_report([tmp_path], tmp_path / "r.html").read_text()


def test_metrics_of_an_earlier_version_are_drawn_under_their_current_names(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    present = read_run(tmp_path).training
    older = {"norm_ratio": "delta_ratio", "cosine_question": "cos_total_it", "cosine_reference": "cos_total_ref"}
    lines = file.read_text().splitlines()
    for name, old in older.items():  # as if the run was resumed after half of its steps
        lines = [line.replace(f"train/{name}", f"train/{old}") for line in lines[:4]] + lines[4:]
    assert "cos_total_it" in lines[1]
    assert "cos_total_it" not in lines[-2]
    file.write_text("\n".join(lines) + "\n")
    assert read_run(tmp_path).training == present


def test_empty_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without a readable config\.yaml"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match=r"without summary\.json"):
        write_diagnosis_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_loads_no_resources(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path)], tmp_path / "r.html").read_text()
    assert "http://www.w3.org/2000/svg" in page  # a name, in the script
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == page.count("http-equiv")
    assert "default-src 'none'" in page


@pytest.mark.parametrize("key", ["truncated", "cut"])
def test_truncated_responses_are_marked_under_the_current_and_the_older_key(key: str) -> None:
    assert is_truncated({key: True})
    assert not is_truncated({key: False})
