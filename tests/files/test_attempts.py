"""Records of ranks: an overwriting run replaces an earlier record, and no other file of that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.files.attempts import RankRecord


def test_an_overwriting_run_replaces_the_record_of_an_earlier_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        RankRecord(tmp_path, rank=0, ranks=1, replaces=True).begin(name)
    [line] = (tmp_path / "ranks" / "rank-00000.jsonl").read_text().splitlines()
    assert '"second"' in line


@pytest.mark.parametrize("content", ["notes of the user", "[1, 2]", '{"event": "other"}'])
def test_another_file_is_not_removed(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ranks" / "rank-00000.jsonl"
    file.parent.mkdir()
    file.write_text(f"{content}\n")
    RankRecord(tmp_path, rank=0, ranks=1, replaces=True).begin("one")
    assert file.read_text().startswith(f"{content}\n")
