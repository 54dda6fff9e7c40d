"""The wheels for a machine without a network have the versions of the lock, are complete and not too large."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import bundle
from tests.cli.test_make import pins


def test_versions_are_those_of_the_lock() -> None:
    locked = pins("26.02/runtime.txt") | pins("26.02/bridge.txt")
    bundled = dict(pin.split("==") for pin in bundle.pins())
    for name in bundle.NAMES:
        canonical = bundle._canonical(name)
        assert locked[canonical] in [v for n, v in bundled.items() if bundle._canonical(n) == canonical]
    assert len(bundled) == len(bundle.NAMES) + len(bundle.BESIDE)


def test_a_name_outside_of_the_lock_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "NAMES", ("megatron-core", "nowhere-at-all"))
    with pytest.raises(ValueError, match="not in the lock: nowhere-at-all"):
        bundle.pins()


def test_the_arguments_of_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], *, check: bool) -> None:
        asked.append(command)
        (tmp_path / "one.whl").write_bytes(b"0" * 1000)

    monkeypatch.setattr(subprocess, "run", pip)
    assert bundle.collect(tmp_path) == 1000
    ready, source = asked
    assert "3.12" in ready
    assert "--no-deps" in ready
    assert "megatron-core==0.16.1" in ready
    assert not any(word.startswith("antlr4") for word in ready)
    assert source[-1] == "antlr4-python3-runtime==4.9.3"
    monkeypatch.setattr(bundle, "LARGEST_BYTES", 999)
    with pytest.raises(ValueError, match="need at most 0 MB"):
        bundle.collect(tmp_path)
