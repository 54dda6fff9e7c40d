"""Random kills over whole runs; `python -m tests.commands.kills --kills 60` is the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow(seconds=120)
def test_runs_that_are_killed_end_with_the_bits_of_one_that_is_not() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands.kills", "--kills", "8", "--cases", "2"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "8 kills in 2 cases, 0 wrong" in done.stdout
