"""The line that is printed after torchrun's report; tests/cli/test_train.py has the real torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.cli.last_line import print_after_torchrun

ROOT = Path(__file__).parents[2]


def test_it_waits_for_the_parent_and_does_nothing_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    child = "from nemo_popsd.cli.last_line import print_after_torchrun as p; p('the last line')"
    parent = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {child!r}], check=True)
sys.stderr.write("the report\\n")
"""
    for variables, expected in (({"TORCHELASTIC_RUN_ID": "x"}, "the report\nthe last line\n"), ({}, "the report\n")):
        done = subprocess.run(
            [sys.executable, "-c", parent],
            env={"PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stderr == expected
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    print_after_torchrun("not printed")
