"""Pages of runs: a report that cannot be written is logged and does not fail the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.commands.pages import report_run, write_diagnosis
from tests.report.runs_on_disk import diagnosis, write_run


def test_a_report_that_cannot_be_written_is_logged_and_does_not_fail_the_run(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path)
    (run / "report.html").mkdir()
    report_run(run)
    assert capsys.readouterr().out == ""
    (record,) = caplog.records
    assert f"the run is complete, but its report was not written: page {run / 'report.html'}" in record.getMessage()
    assert not list(run.glob(".report.html.*"))
    (run / "report.html").rmdir()
    report_run(run)
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"


def test_only_rank_0_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    report_run(run)
    write_diagnosis(diagnosis("x"), tmp_path / "diagnosis")
    assert not (run / "report.html").exists()
    assert not (tmp_path / "diagnosis").exists()
    monkeypatch.setenv("RANK", "0")
    write_diagnosis(diagnosis("x"), tmp_path / "diagnosis")
    assert capsys.readouterr().out == f"diagnosis: {tmp_path / 'diagnosis' / 'index.html'}\n"
