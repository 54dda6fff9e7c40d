"""Files that are not regular files are named and never opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import check_yaml, foreign_entry, read_strict_json, read_text, unreadable


def test_unreadable_names_the_type_of_file(tmp_path: Path) -> None:
    (tmp_path / "complete").write_text("x")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("complete")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    reasons = {path.name: unreadable(path) for path in tmp_path.iterdir()}
    assert reasons == {
        "complete": None,
        "link": None,
        "empty": "is empty",
        "folder": "is a directory, not a file",
        "pipe": "is a pipe, not a file",
        "zero": "is a device, not a file",
        "lost": "is a dangling link",
        "pointer": "is a git-lfs pointer in place of the file (run `git lfs pull`)",
    }
    assert unreadable(tmp_path / "nowhere") == "cannot be read (No such file or directory)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0)
    assert unreadable(tmp_path / "file") == "cannot be read (Permission denied)"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfe", "cannot be read"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"{", "file.json: Expecting"),
        (b"7", "a JSON int; need a JSON object"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b'{"a": NaN}', "NaN, which is not finite"),
        (b'{"a": 1e999}', "1e999, which is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "file.json: "),
        (b"[" * 100_000, "nested too deeply"),
        (rb'{"a": "\ud83d"}', "surrogates not allowed"),
        (b" " * 200, "file.json, which has 200 bytes, more than 100"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^model m: got .*{named}.*; fetch it") as refused:
        read_text(file, "model m", fix="fetch it", limit=100) if b"   " in content else read_strict_json(
            file, "model m", fix="fetch it"
        )
    assert "\n" not in str(refused.value)


def test_valid_json_is_returned(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"a": [1, 2.5, null]}')
    assert read_strict_json(tmp_path / "file.json", "model m", fix="fetch it") == {"a": [1, 2.5, None]}


def test_aliases_are_counted_as_often_as_they_are_used() -> None:
    check_yaml("a: &a [1, 2]\nb: [*a, *a]")
    bomb = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
    for text in (bomb, "a: &a [*a]", "[" * 100_000):
        with pytest.raises(yaml.YAMLError):
            check_yaml(text)


def test_entries_of_a_directory_that_lead_out_of_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "folder").mkdir(parents=True)
    outside.write_text("x")
    (inside / "folder" / "link").symlink_to("../folder")
    (tmp_path / "link").symlink_to(inside)
    assert foreign_entry(tmp_path / "link") is None
    (inside / "folder" / "link out").symlink_to(outside)
    assert foreign_entry(inside) == "'folder/link out', a symbolic link out of the directory"
    (inside / "folder" / "link out").unlink()
    os.mkfifo(inside / "pipe")
    assert foreign_entry(inside) == "'pipe', which is neither a file nor a directory"
