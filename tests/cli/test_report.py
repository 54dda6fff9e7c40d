"""`popsd report`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from tests.report.runs_on_disk import write_run


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "a", name="first"), write_run(tmp_path / "b", name="second")
    assert cli.main(["report", str(first)]) == 0
    assert capsys.readouterr().out == f"report: {first / 'report.html'}\n"
    page = tmp_path / "compared.html"
    assert cli.main(["report", str(first), str(second), "--output", str(page)]) == 0
    assert "first vs. second" in page.read_text()
    assert cli.main(["report", str(tmp_path)]) == cli.USER_ERROR
    assert "the output directory of a training run" in capsys.readouterr().err


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = f"""
import sys
from nemo_popsd.cli.main import main
assert main(["report", {str(tmp_path)!r}]) == 0
sys.exit("imported torch" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_report_replaces_only_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "thesis.html"
    page.write_text("<html>three weeks</html>")
    assert cli.main(["report", str(tmp_path), "--output", str(page)]) == 2
    assert "a file that is not a page of nemo_popsd" in capsys.readouterr().err
    assert page.read_text() == "<html>three weeks</html>"
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "pipe")]) == 2
    assert "something other than a regular file" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_popsd.report.write_report", interrupt)
    assert cli.main(["report", "somewhere"]) == 130
    assert capsys.readouterr().err == "popsd report: stopped by Ctrl-C\n"
