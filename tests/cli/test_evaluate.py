"""`popsd evaluate`, with a model, with an endpoint and to compare."""

from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from tests.cli.conftest import TINY
from tests.evaluation.scores import score
from tests.evaluation.server import Server
from tests.evaluation.test_comparison import saved


def test_evaluate_takes_overrides_on_both_sides_of_the_option(calls: list[tuple], tmp_path: Path) -> None:
    words = ["evaluate", TINY, f"output={tmp_path}", "--checkpoint", str(tmp_path), "evaluation.problems=4", "seed=5"]
    assert cli.main(words) == 0
    ((name, config, checkpoint),) = calls
    assert (name, checkpoint) == ("evaluate", str(tmp_path))
    assert (config.output, config.evaluation.problems, config.seed) == (str(tmp_path), 4, 5)
    cli.main(["evaluate", TINY, f"output={tmp_path}"])
    assert calls[-1][2] is None


def test_evaluate_with_an_endpoint_builds_no_model(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with Server() as server:
        words = [f"output={tmp_path}", f"evaluation.endpoint.url={server.url}", "evaluation.problems=2"]
        assert cli.main(["evaluate", TINY, *words]) == 0
    assert calls == []
    assert "accuracy (avg@12)" in capsys.readouterr().out


def test_compare_needs_no_configuration(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [[score("p"), score("q", right)] for right in (False, True)]
    directories = [saved(tmp_path / name / "validation", part) for name, part in zip("ab", scores, strict=True)]
    assert cli.main(["evaluate", "--compare", *directories]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("base: a/validation (the first")
    assert printed.splitlines()[2].split() == ["a/validation", "b/validation", "change"]
    assert cli.main(["evaluate", "--compare", *directories, "--base", "b/validation"]) == 0
    assert capsys.readouterr().out.startswith("base: b/validation (by --base)")
    assert cli.main(["evaluate", TINY, "--base", "b"]) == 2
    assert "--base without --compare" in capsys.readouterr().err
    assert cli.main(["evaluate", TINY, "--compare", *directories]) == 2
    assert "omit the other arguments" in capsys.readouterr().err
    assert cli.main(["evaluate"]) == 2
    assert "need CONF, or --compare" in capsys.readouterr().err
    assert calls == []
