import io
import re
import sys
from types import SimpleNamespace

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
    first, last = shown(capsys)
    assert re.fullmatch(
        r"step 4/5  loss 0\.5  tokens/response 100  tok/s 2000  elapsed 0:\d\d:\d\d, left 0:\d\d:\d\d", first
    )
    assert re.fullmatch(r"step 5/5  loss 1\.5  tokens/response 100  tok/s 2000  elapsed 0:\d\d:\d\d", last)


@pytest.mark.parametrize(("batches", "lines"), [(1, 0), (3, 3)])
def test_a_validation_with_several_batches_shows_its_progress(
    batches: int, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = StepProgress(5)
    trainer = SimpleNamespace(num_val_batches=[batches])
    progress.on_validation_start(trainer, None)  # type: ignore[arg-type]
    for index in range(batches):
        progress.on_validation_batch_end(trainer, None, None, None, index)  # type: ignore[arg-type]
    progress.on_validation_end(trainer, None)  # type: ignore[arg-type]
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validation ")]
    assert len(found) == lines
    assert not lines or found[-1].startswith("validation 3/3  elapsed 0:00:")


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
