"""Reading of JSON files, including damaged and truncated ones and those of other programs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import as_dataclass, open_regular, parse_json, read_json, read_json_lines


@dataclass
class Entry:
    name: str
    tokens: int
    share: float | None
    counts: dict[str, int] = field(default_factory=dict)
    ends: tuple[float, ...] = ()


GOOD: dict[str, Any] = {"name": "a", "tokens": 3, "share": 0.5, "counts": {"x": 1}, "ends": [0, 1.5]}


def test_an_object_with_the_fields_of_a_dataclass() -> None:
    assert as_dataclass(Entry, GOOD, "f").counts == {"x": 1}
    assert as_dataclass(Entry, {"name": "a", "tokens": 3, "share": None}, "f").share is None


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "3"},
        {"tokens": 3.5},
        {"tokens": True},
        {"tokens": 10**400},
        {"share": "x"},
        {"share": 10**400},
        {"counts": []},
        {"counts": {"x": None}},
        {"ends": 3},
        {"ends": ["a"]},
        {"other": 1},
    ],
    ids=str,
)
def test_an_object_with_another_field_or_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"f:3: got damaged data \(.*{next(iter(change))}"):
        as_dataclass(Entry, {**GOOD, **change}, "f:3")


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"name": "a"}], ids=str)
def test_a_value_that_is_not_the_dataclass_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="damaged data"):
        as_dataclass(Entry, value, "f")


def test_damaged_lines_are_refused_and_a_partial_last_line_can_be_skipped(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a"')
    assert [value for _, value in read_json_lines(file, skip_partial=True)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"f\.jsonl:4: got damaged data"):
        list(read_json_lines(file))
    for middle in (b'{"a"', b"\x00\x00", b"\xff", b"[" * 100_000):
        file.write_bytes(b'{"a": 1}\n' + middle + b'\n{"a": 2}\n')
        with pytest.raises(UserError, match=r"f\.jsonl:2: got damaged data"):
            list(read_json_lines(file, skip_partial=True))


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(UserError, match="not a regular file"):
            read_json(path)
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "none")


def test_an_unpaired_surrogate_is_refused() -> None:
    assert parse_json(r'"\ud83d\ude00"', "here") == "\U0001f600"
    with pytest.raises(UserError, match="here: got damaged data"):
        parse_json(r'["\ud83d"]', "here")
