"""`popsd convert`."""

from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli


def test_convert(calls: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = str(tmp_path), str(tmp_path / "out")
    assert cli.main(["convert", "hf-to-nemo", source, output]) == 0
    assert cli.main(["convert", "hf-to-nemo", source, output, "--verify", "--precision", "bf16"]) == 0
    assert cli.main(["convert", "nemo-to-hf", source, output, "--trust-remote-code", "--shard-size", "0.5"]) == 0
    plain = {"precision": None, "verifies": False, "trust_remote_code": False}
    assert calls == [
        ("hf_to_nemo", source, output, plain),
        ("hf_to_nemo", source, output, {**plain, "precision": "bf16", "verifies": True}),
        ("nemo_to_hf", source, output, {**plain, "trust_remote_code": True, "shard_bytes": 1 << 29}),
    ]
    assert cli.main(["convert", "hf-to-nemo", source, source]) == 2
    assert "which exists" in capsys.readouterr().err
    assert cli.main(["convert", "nemo-to-hf", str(tmp_path / "none"), output]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_missing_source_is_asked_for_in_the_format_of_the_direction(
    tmp_path: Path, calls: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    for direction, need in (
        ("hf-to-nemo", "need a Hugging Face directory, with config.json"),
        ("nemo-to-hf", "need a checkpoint that a run has written"),
    ):
        assert cli.main(["convert", direction, str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
        assert need in capsys.readouterr().err
    assert calls == []
