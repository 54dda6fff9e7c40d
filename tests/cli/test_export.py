"""`popsd export`."""

import shutil
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.files.ownership import ADAPTER, EXPORT, sizes_of, write_mark


def test_export(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "hf"
    checkpoint.mkdir()
    assert cli.main(["export", str(checkpoint), str(output)]) == 0
    assert calls == [("export", str(checkpoint), str(output))]
    assert cli.main(["export", str(tmp_path / "none"), str(output)]) == 2
    assert "CHECKPOINT" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [[], ["--adapter"]])
def test_export_replaces_only_an_earlier_export(
    calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: list[str]
) -> None:
    checkpoint, output = tmp_path / "run" / "checkpoint", tmp_path / "hf"
    checkpoint.mkdir(parents=True)
    for other in (checkpoint, checkpoint / "deeper", checkpoint.parent, tmp_path / "link"):
        if other.name == "link":
            other.symlink_to(checkpoint)
        assert cli.main(["export", *adapter, str(checkpoint), str(other)]) == 2
        assert "CHECKPOINT" in capsys.readouterr().err
    for place in (output, tmp_path / "hf.partial", tmp_path / "hf.replaced"):
        place.mkdir()
        (place / "weights.bin").write_text("three weeks")
        assert cli.main(["export", *adapter, str(checkpoint), str(output)]) == 2
        printed = capsys.readouterr().err
        assert f"{place}: got a directory without the mark .nemo_popsd" in printed
        assert "nothing was removed" in printed
        assert (place / "weights.bin").exists()
        shutil.rmtree(place)
    (output / "config.json").parent.mkdir()
    (output / "config.json").write_text("{}")
    write_mark(output, ADAPTER if adapter else EXPORT, sizes_of(output))
    assert cli.main(["export", *adapter, str(checkpoint), str(output)]) == 0
    assert len(calls) == 1
    assert cli.main(["export", *([] if adapter else ["--adapter"]), str(checkpoint), str(output)]) == 2
