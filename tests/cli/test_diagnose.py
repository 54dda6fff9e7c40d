"""`popsd diagnose`."""

from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from tests.cli.conftest import TINY


def test_diagnose(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output={tmp_path}", "diagnosis.rows=3"]
    assert cli.main(["diagnose", TINY, *overrides, "--checkpoint", str(tmp_path)]) == 0
    assert calls == [("diagnose", load_config(TINY, overrides), str(tmp_path))]
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "data.train.path=''"]) == cli.USER_ERROR
    assert "data.train" in capsys.readouterr().err
    assert cli.main(["diagnose", TINY, f"output={tmp_path}", "--checkpoint", "/nowhere"]) == cli.USER_ERROR
    assert "--checkpoint '/nowhere'" in capsys.readouterr().err
