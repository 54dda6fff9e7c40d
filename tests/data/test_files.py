"""The files that a path names, and the paths that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_popsd.data.files import resolve_path, row_names, source_files
from nemo_popsd.errors import UserError


def make_files(directory: Path, *names: str) -> list[str]:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}\n")
    return [str(directory / name) for name in names]


def file_names(*paths: object) -> list[str]:
    return [file.name for file in source_files([str(path) for path in paths], setting="data.train")]


def test_files_patterns_and_directories_in_their_order(tmp_path: Path) -> None:
    make_files(
        tmp_path, "z.jsonl", "part-2.jsonl", "part-1.jsonl", "d/b.jsonl", "d/a.jsonl", "d/README.md", "d/.hidden.jsonl"
    )
    assert file_names(tmp_path / "z.jsonl") == ["z.jsonl"]
    assert file_names(tmp_path / "part-*.jsonl", tmp_path / "z.jsonl") == ["part-1.jsonl", "part-2.jsonl", "z.jsonl"]
    assert file_names(tmp_path / "d") == ["a.jsonl", "b.jsonl"]
    make_files(tmp_path, "[odd].jsonl")
    assert file_names(tmp_path / "[odd].jsonl") == ["[odd].jsonl"]
    with pytest.raises(UserError, match=r"z\.jsonl' twice"):
        file_names(tmp_path / "z.jsonl", tmp_path / "*.jsonl")


def test_a_directory_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    shards = [f"data/train-0000{index}-of-00003.parquet" for index in range(3)]
    make_files(tmp_path, "README.md", *shards)
    assert file_names(tmp_path) == [Path(shard).name for shard in shards]
    (tmp_path / shards[1]).unlink()
    for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-*"):
        with pytest.raises(UserError, match="2 of 3 shards of train; shard 1 is missing"):
            file_names(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "an empty directory"),
        (("a.csv", "b.txt"), "no data file, only a.csv, b.txt"),
        (("a.jsonl", "b.parquet"), r"\.jsonl and \.parquet files"),
        (("train-1.jsonl", "test-1.jsonl"), r"test and train files .*pattern, such as '.*test\*'"),
    ],
)
def test_ambiguous_directories_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    make_files(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        file_names(tmp_path)


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/zero", tmp_path / "pipe.jsonl", tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(UserError, match="neither a regular file nor a directory"):
            file_names(path)


@pytest.mark.parametrize("path", ["no/such.jsonl", "no/*.jsonl", "a\0b", "x" * 5000])
def test_missing_files_are_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.train\.path=.*(does not exist|matches no file)"):
        file_names(path)


def test_a_pattern_that_matches_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match="matches the directory"):
        file_names(tmp_path / "*")


def test_names_of_rows_distinguish_files(tmp_path: Path) -> None:
    assert row_names([tmp_path / "a.jsonl"]) == ["a.jsonl"]
    assert row_names([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]


def test_embedded_names() -> None:
    assert resolve_path("nemo_popsd:tiny_train", setting="data.train").is_file()
