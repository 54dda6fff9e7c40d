from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import (
    Evaluation,
    average_over_sets,
    changes_between,
    compare_directories,
    comparison_table,
    read_evaluations,
)
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES
from nemo_popsd.evaluation.records import EvaluationDirectory, SampleScore
from tests.evaluation.scores import score

CONFIG = EvaluationConfig(resamples=500)


def evaluation(scores: list[SampleScore]) -> Evaluation:
    return Evaluation.of(scores, CONFIG)


def saved(path: Path, scores: list[SampleScore]) -> str:
    found = evaluation(scores)
    labels = {"model": "m", "set": path.name, "scoring": {"comparison": COMPARISON_RULES}}
    EvaluationDirectory(path).conclude(found.scores, {**labels, **found.summary.as_dict()})
    return str(path)


BEFORE = [score(f"p{n}", n % 2 == 0) for n in range(20)]
AFTER = [score(f"p{n}", n % 2 == 0 or n == 1, waits=2, tokens=200) for n in range(20)]


def rows(table: str) -> dict[str, str]:
    return {line[:31].strip(): " ".join(line[31:].split()) for line in table.splitlines()}


def test_changes_are_paired_and_over_common_problems() -> None:
    found = changes_between(evaluation(BEFORE), evaluation(AFTER), resamples=500)
    assert found["accuracy"].difference == pytest.approx(0.05)
    low, high = found["accuracy"].interval
    assert low == 0.0  # 19 of 20 problems did not change, so no resample has a negative change
    assert 0.1 <= high <= 0.2
    assert found["marker_rates.Wait"].difference == pytest.approx(10.0)
    fewer = evaluation([*AFTER[:4], score("other", False)])
    assert changes_between(evaluation(BEFORE), fewer, resamples=500)["accuracy"].difference == pytest.approx(0.25)
    with pytest.raises(UserError, match="different problems"):
        changes_between(evaluation(BEFORE), evaluation([score("elsewhere")]), resamples=500)


def test_the_table_of_two() -> None:
    table = comparison_table({"before": evaluation(BEFORE), "after": evaluation(AFTER)}, resamples=500)
    lines = table.splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    found = rows(table)
    assert found["accuracy (avg@1)"].startswith("50.0 % [")
    assert " 55.0 % [" in found["accuracy (avg@1)"]
    assert "+5.0 [+0.0, +" in found["accuracy (avg@1)"]
    assert found["Wait"] == "0.00 [0.00, 0.00] 10.00 [10.00, 10.00] +10.00 [+10.00, +10.00]"
    assert found["mean response tokens"] == "100.0 [100.0, 100.0] 200.0 [200.0, 200.0] +100.0 [+100.0, +100.0]"
    assert found["problems"] == "20 20"
    assert lines[-1] == "in brackets: 95 % bootstrap intervals over problems"
    aligned = [line for line in lines if line.endswith("]")]
    assert len({len(line) for line in aligned}) == 1


def test_tables_of_one_and_of_three() -> None:
    one, other = evaluation(BEFORE), evaluation([score("p0", markers={"Hmm": 1}, tokens=10)])
    assert "change" not in comparison_table({"only": one}, resamples=500)
    table = comparison_table({"a": one, "b": other, "c": one}, resamples=500)
    assert "b − a" in table.splitlines()[0]  # noqa: RUF001
    assert rows(table)["Hmm"].split()[:2] == ["-", "100.00"]
    assert "change of b: over the 1 problems that both have" in table
    assert "change of c" not in table


def test_directories_of_one_set_each(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "x" / "step-0", BEFORE), saved(tmp_path / "y" / "step-0", AFTER)]
    table = compare_directories(paths, resamples=500)
    assert table.splitlines()[0] == "base: x/step-0 (the first argument; --base NAME selects another)"
    assert table.splitlines()[2].split() == ["x/step-0", "y/step-0", "change"]
    assert "+5.0" in table


def test_the_base_is_selected_by_name(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name, scores) for name, scores in (("a_trained", AFTER), ("base", BEFORE))]
    for base in ("base", paths[1]):
        table = compare_directories(paths, resamples=500, base=base)
        assert table.splitlines()[0] == "base: base (by --base)"
        assert table.splitlines()[2].split() == ["base", "a_trained", "change"]
        assert "+5.0" in table
    with pytest.raises(
        UserError, match="--base other, which names none of the evaluations; need one of a_trained, base"
    ):
        compare_directories(paths, resamples=500, base="other")
    assert compare_directories(paths[:1], resamples=500).splitlines()[0].split() == ["a_trained"]


def test_a_missing_directory_is_reported_before_a_base_that_would_be_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got no summary.json in '.*/\*'"):
        compare_directories([str(tmp_path / "*")], resamples=500, base="base")


def test_models_with_several_sets_are_averaged(tmp_path: Path) -> None:
    for model, scores in (("base", BEFORE), ("trained", AFTER)):
        saved(tmp_path / model / "aime24", scores)
        saved(tmp_path / model / "aime25", [score(f"q{n}", n < 5) for n in range(10)])
    saved(tmp_path / "trained" / "only_here", AFTER)
    text = compare_directories([str(tmp_path / "base"), str(tmp_path / "trained")], resamples=500)
    assert "only_here" not in text
    assert text.splitlines()[0].startswith("base: base (")
    assert text.splitlines()[2] == "aime24"
    *_, title, base, trained = text.splitlines()
    assert title == "accuracy, average of aime24, aime25"
    assert base.startswith("  base: 50.0 % [")
    assert trained.startswith("  trained: 52.5 % [")
    assert "change +2.5 [+0.0, +" in trained


def test_sets_of_an_average_have_equal_weight() -> None:
    small = evaluation([score("a"), score("b")])
    large = evaluation([score(f"p{n}", False) for n in range(30)])
    assert "m: 50.0 % [50.0, 50.0]" in average_over_sets({"s": {"m": small}, "l": {"m": large}}, resamples=500)


def test_evaluations_without_common_problems_are_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base" / "one", BEFORE)
    saved(tmp_path / "base" / "two", BEFORE)
    saved(tmp_path / "other" / "three", AFTER)
    with pytest.raises(UserError, match="base with one, two; other with three"):
        compare_directories([str(tmp_path / "base"), str(tmp_path / "other")], resamples=500)
    with pytest.raises(UserError, match="twice"):
        compare_directories([base, base], resamples=500)
    with pytest.raises(UserError, match="a finished evaluation"):
        read_evaluations(tmp_path / "nothing")


def test_a_concluded_evaluation_is_read_back(tmp_path: Path) -> None:
    path = saved(tmp_path / "one", BEFORE)
    assert read_evaluations(path) == {"one": evaluation(BEFORE)}
