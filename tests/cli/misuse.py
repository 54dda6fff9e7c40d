"""Command lines that are refused when they are parsed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_popsd.cli import main as cli


def error_of(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that ``popsd *words`` prints, after which it ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("popsd: error: ")
    assert err.count("\n") == 1
    return err
