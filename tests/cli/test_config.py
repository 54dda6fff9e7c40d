"""`popsd config`."""

from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.loading import load_config
from tests.cli.conftest import TINY


def test_the_printed_configuration_loads_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", TINY, "training.steps=3", "data.train.answer_pattern=#### (.+)"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(TINY, ["training.steps=3", "data.train.answer_pattern=#### (.+)"])
