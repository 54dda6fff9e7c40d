"""Files that are not configurations, or that would take too long to read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def refusal(path: str | Path) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as printed:
        load_config(path)
    assert time.monotonic() - start < 5
    assert len(str(printed.value)) < 1000
    return str(printed.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", "/dev/null", tmp_path / "fifo", "/dev/tty"):
        assert "regular file" in refusal(path) or "No such device" in refusal(path)
    assert "a directory" in refusal(tmp_path)
    assert " null " in refusal("a\0b")  # a null byte, in Python 3.13 a null character
    assert "too long" in refusal("a" * 5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: x\n" + b"#" * 10**6, "more than 128 KiB"),
        (b"\x00" * 100, "valid YAML"),
        (bytes(range(256)), "not UTF-8"),
        ("name: x".encode("utf-16"), "not UTF-8"),
        (b"[" * 3000 + b"]" * 3000, "16 levels"),
        (b"training: " + b"{a: " * 2000 + b"1" + b"}" * 2000, "16 levels"),
        (b"[" + b"x, " * 30_000 + b"x]", "5,000 values"),
        (BOMB.encode(), "unknown key a0"),
        (b"training: &t\n  x: *t\n", "unknown key training.x"),
        (b"data: &d {train: {columns: &c {<<: *c}}}", "16 levels"),
        (b"evaluation: {markers: &m [a, *m]}", "need a list of texts"),
        (b"a: 1\n---\nb: 2\n", "single document"),
        (b"seed: !!python/object/apply:os.system ['true']", "the tag '!!python/object/apply:os.system'"),
        (b"seed: !!int '3'", "the tag '!!int'"),
        (b"seed: !foo 3", "the tag '!foo'"),
        (b"training.steps: 3", "training.steps as one key; need a key below its section; training: {steps: ...}"),
        (b"training: {1: 2}", "unknown key training.1"),
        (b"? [a, b]\n: 2", "unknown key [sequence]"),
        (b"yes: 2", "unknown key yes"),
        (b"seed: 1\nname: a\nseed: 1", ":3: got seed again, first in line 1"),
        (b"training: {steps: 1}\ntraining: {steps: 1}", ":2: got training again, first in line 1"),
        (b"training: {<<: 3}", "got << of 3"),
    ],
)
def test_files_that_are_not_configurations_are_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(text)
    assert message in refusal(tmp_path / "file.yaml")


def test_endless_aliases_are_refused(tmp_path: Path) -> None:
    text = "data:\n  train: {columns: &a {id: x}}\n  validation:\n    columns: {<<: "
    for name in "bcdefgh":
        text += f"&{name} [" + ", ".join(["*a"] * 9) + "], <<: "
    merged = "data: {train: {columns: &a {id: x}}, validation: {columns: {<<: [" + "*a, " * 4000 + "*a]}}}"
    (tmp_path / "file.yaml").write_text(merged)
    assert load_config(tmp_path / "file.yaml").data.validation.columns.id == "x"
    nested = "&b {<<: [" + "*a, " * 50 + "]}"
    for level in range(4):
        nested = f"&c{level} {{<<: [{nested}, " + ("*b, " if not level else f"*c{level - 1}, ") * 50 + "]}"
    (tmp_path / "file.yaml").write_text(merged.replace("*a, " * 4000 + "*a", nested))
    assert "5,000 values" in refusal(tmp_path / "file.yaml")


def test_common_yaml_syntax_is_supported(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(
        b"\xef\xbb\xbfdata:\r\n  train:\r\n    columns: &c {id: id, answer: null}\r\n"
        b"  validation:\r\n    columns: {<<: *c, answer: a}\r\n"
    )
    config = load_config(tmp_path / "file.yaml")
    assert (config.data.train.columns.id, config.data.train.columns.answer) == ("id", None)
    assert (config.data.validation.columns.id, config.data.validation.columns.answer) == ("id", "a")
