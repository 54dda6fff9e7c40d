import io
import sys

import pytest

from nemo_popsd.observability.progress import StepProgress
from tests.observability.one_step import fit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]


def test_without_a_terminal_there_is_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    fit(2, callbacks=[StepProgress(5, completed=3)], logger=False, enable_progress_bar=True)
    assert shown(capsys) == [
        "step 4/5  loss 0.5  tokens/response 100  tok/s 2000",
        "step 5/5  loss 1.5  tokens/response 100  tok/s 2000",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(2, callbacks=[StepProgress(5, completed=3)], logger=False, enable_progress_bar=True)
    last = terminal.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert "5/5" in last
    assert "loss=1.5" in last
    assert "a line of text" in capsys.readouterr().out


def test_progress_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    fit(1, callbacks=[StepProgress(5, enabled=False)], logger=False, enable_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == "a line of text\n"
    assert "step 1" not in err


def test_other_ranks_show_no_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    fit(1, callbacks=[StepProgress(5)], logger=False, enable_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 1" not in err
