"""Verdicts of older comparison rules are not compared with those of the current rules."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Evaluation
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.records import EvaluationDirectory, Problem, Sample, SampleSettings
from tests.evaluation.scores import score

SETTINGS = SampleSettings("m", "f", "e", 1, 1.0, 1.0, 0, 8, (), {"p": "1", "q": "2"})


def written_before(path: Path) -> EvaluationDirectory:
    """An evaluation whose verdicts the current rules reverse; one of its samples has no score."""
    directory = EvaluationDirectory(path / "set")
    problems = [Problem("p", "?", "18"), Problem("q", "?", "4")]
    texts = {("p", 0): "#### 18 dollars", ("q", 0): r"#### 4\sqrt(2)", ("q", 1): "#### 4"}
    samples = [Sample(problem, number, text, 5, False) for (problem, number), text in texts.items()]
    directory.replace(SETTINGS, problems, samples)
    found = Evaluation.of([score("p", False), score("q", True)], EvaluationConfig(resamples=100))
    scoring = {"markers": ["Wait"], "answer_pattern": "#### (.+)", "without_box": "none", "verify_seconds": 5.0}
    directory.conclude(found.scores, {"model": "m", "set": "s", "scoring": scoring, **found.summary.as_dict()})
    return directory


def test_samples_scored_by_older_rules_are_scored_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = written_before(tmp_path)
    before = (directory.path / "scores.jsonl").read_bytes()
    with caplog.at_level(logging.WARNING):
        found = Evaluation.read(directory)
    assert [(one.problem, one.correct) for one in found.scores] == [("p", True), ("q", False)]
    assert found.summary.samples == 2
    assert list(found.summary.marker_rates) == ["Wait"]
    assert "other rules of comparison" in caplog.text
    assert (directory.path / "scores.jsonl").read_bytes() == before


@pytest.mark.parametrize("gone", ["samples-00000.jsonl", "problems.jsonl"])
def test_scores_of_older_rules_without_samples_are_refused(tmp_path: Path, gone: str) -> None:
    directory = written_before(tmp_path)
    (directory.path / gone).unlink()
    with pytest.raises(UserError, match=r"2 of 2 samples missing; .*popsd evaluate"):
        Evaluation.read(directory)


def test_scores_of_the_current_rules_are_read_unchanged(tmp_path: Path) -> None:
    directory = written_before(tmp_path)
    summary = json.loads((directory.path / "summary.json").read_text())
    summary["scoring"]["comparison"] = 2
    (directory.path / "summary.json").write_text(json.dumps(summary))
    assert [one.correct for one in Evaluation.read(directory).scores] == [False, True]
