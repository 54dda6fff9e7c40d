"""Random kills of complete runs; `python -m tests.commands.kills --kills 60` runs all cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow(seconds=120)
def test_killed_runs_end_bit_equal_to_an_undisturbed_run() -> None:
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
