"""User-defined answer checkers: found by entry point, recorded with the scores, refused in one line if they fail."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from nemo_popsd.config.consistency import check_evaluation_run
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.checkers import checker_version, load_checker
from nemo_popsd.evaluation.comparison import compare_directories
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier, Verdict
from nemo_popsd.evaluation.records import EvaluationDirectory
from nemo_popsd.evaluation.run import conclude_all
from tests.evaluation.test_run import drawn

SOURCE = """
def same(answer, expected):
    return answer.split("|")[0] == expected.split("|")[0]

def broken(answer, expected):
    raise KeyError(answer)

def vague(answer, expected):
    return 1

number = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with checkers."""
    site = tmp_path / "site"
    (site / "popsd_test_checks-1.2.dist-info").mkdir(parents=True)
    (site / "popsd_test_checks.py").write_text(SOURCE)
    information = site / "popsd_test_checks-1.2.dist-info"
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: popsd-test-checks\nVersion: 1.2\n")
    names = ("same", "broken", "vague", "number", "absent")
    lines = [f"{name} = popsd_test_checks:{name}" for name in names]
    (information / "entry_points.txt").write_text("\n".join(["[nemo_popsd.answer_checkers]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()


def test_a_checker_replaces_the_rules() -> None:
    with AnswerVerifier(1, "same") as verifier:
        assert verifier.compare("a|1", "a|2") == Verdict(True, "checker")
        assert verifier.compare("2", "2.0") == Verdict(False, "checker")
        assert verifier.compare(None, "2") == Verdict(False, "missing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing",
            r"'nothing': 0 installed checkers of this name \(registered: absent, broken, number, ",
        ),
        ("absent", "popsd_test_checks:absent, which cannot be imported"),
        ("number", "popsd_test_checks:number, which is not a function"),
    ],
)
def test_a_checker_that_cannot_be_loaded_is_refused_before_samples_are_generated(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_checker(name)
    config = PopsdConfig(evaluation=EvaluationConfig(checker=name))
    config.student.source = "nemo_popsd:tiny_reasoner"
    with pytest.raises(UserError, match=message):
        check_evaluation_run(config, world_size=1)


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "KeyError: '1', for answer '1' and expected '2'"), ("vague", "the result 1 for")]
)
def test_a_checker_that_fails_is_named_with_the_answers(name: str, message: str) -> None:
    with AnswerVerifier(1, name) as verifier, pytest.raises(UserError, match=message):
        verifier.compare("1", "2")


def test_scores_record_their_checker_and_other_checkers_are_not_compared(tmp_path: Path) -> None:
    directories = []
    for name, checker in (("a", "same"), ("b", "same"), ("c", "")):
        conclude_all([drawn(tmp_path / name, [0])], EvaluationConfig(checker=checker, resamples=100), model=name)
        directories.append(str(tmp_path / name / "s"))
    scoring = EvaluationDirectory(directories[0]).summary()["scoring"]
    assert (scoring["checker"], scoring["checker_version"]) == ("same", "popsd-test-checks 1.2")
    assert checker_version("same") == "popsd-test-checks 1.2"
    assert EvaluationDirectory(directories[2]).summary()["scoring"]["checker"] == ""
    assert "accuracy" in compare_directories(directories[:2], resamples=100)
    with pytest.raises(UserError, match=r"evaluation\.checker='same' and by ''"):
        compare_directories(directories, resamples=100)
