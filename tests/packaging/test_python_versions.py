"""Other versions of Python, where this machine has them: the commands that need no torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.doctor.clean import ROOT, CleanEnvironment, lend

PURE = ("antlr4-python3-runtime", "omegaconf", "packaging", "PyYAML")
"""Packages that these commands import. Their C modules, which belong to one version of Python, are optional."""


def interpreter(version: str) -> str:
    """An interpreter of that version; skips the test without one."""
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))]
    for path in found:
        # pyenv's `python3.13` may be a script that finds no such version.
        if path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    pytest.skip(f"no Python {version} on this machine")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_commands_without_torch_run(version: str, tmp_path: Path) -> None:
    environment = CleanEnvironment(tmp_path / "venv", interpreter=interpreter(version))
    lend(environment, *PURE)
    conf = tmp_path / "tiny.yaml"
    for words in (
        ["--help"],
        ["init", "tiny", str(tmp_path)],
        ["config", str(conf), "training.steps=4"],
        ["config", "--describe", "training"],
        ["plan", str(conf), "nodes=1"],
    ):
        done = environment.run("-W", "error", "-m", "nemo_popsd", *words, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    compiled = environment.run("-m", "compileall", "-q", str(ROOT / "nemo_popsd"), PYTHONPYCACHEPREFIX=str(tmp_path))
    assert compiled.returncode == 0, compiled.stdout
