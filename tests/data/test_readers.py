"""Formats and defects of data files: which are read, and the one-line message for the others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_popsd.data import readers
from nemo_popsd.data.readers import MalformedError, column_names, rows_of
from nemo_popsd.errors import UserError

ROW = {"question": "Q\u2028?", "reference": "R"}
LINE = json.dumps(ROW).encode()


def read(path: Path, *columns: str) -> list[object]:
    contents = [row.content for row in rows_of(path, columns, "data.train")]
    return [str(content) if isinstance(content, MalformedError) else content for content in contents]


@pytest.mark.parametrize(
    "content",
    [
        LINE + b"\n" + LINE,
        b"\xef\xbb\xbf" + LINE + b"\r\n" + b"\xef\xbb\xbf" + LINE + b"\r\n\r\n",  # two files with marks, joined
        LINE + b"\n\n   \n" + LINE + b"\n",
    ],
)
def test_lines_of_jsonl_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl") == [ROW, ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "question": "b"}', "the key 'question' twice"),
        (b'{"question": "a", }', "a line that is not valid JSON"),
        (b"\x89PNG\r\n\x1a\n\x00", "bytes that are not UTF-8"),
        (b"question,answer", "a line that is not valid JSON"),
        (b"3", "a JSON int instead of an object"),
    ],
)
def test_a_bad_row_is_malformed_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    rows = read(tmp_path / "a.jsonl")
    assert message in str(rows[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 and then nothing of the kind", "need JSONL"),
        ("a.parquet", b"{}", "name ends in .parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.json", b'[{"question": "Q"}]', "one JSON array"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "gzip"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd"),
        ("a.zip", b"PK\x03\x04", "a zip archive"),
        ("a.jsonl", json.dumps(ROW).encode("utf-16"), "UTF-16 text"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(LINE + b"\n" + b'{"question": "' + b"a" * (1 << 21))
    with pytest.raises(UserError, match="line 2 of more than 1 MiB"):
        read(tmp_path / "a.jsonl")


def test_a_truncated_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROW] * 1000), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.parquet: got .*need JSONL") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_columns_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": {"b": 1}, "a.c": 2, "d": 3}]), path)
    assert read(path, "a.b", "a.c") == [{"a": {"b": 1}, "a.c": 2}]
    with pytest.raises(UserError, match=r"columns a, a\.c, d; need the mapped columns, including e\.f"):
        read(path, "a.b", "e.f")


def test_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert column_names(tmp_path / name, "data.train") == ["question", "reference"]


def test_unreadable_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="need JSONL"):
        read(tmp_path)
