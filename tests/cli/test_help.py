"""`--help` of every command."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["init"],
        ["train"],
        ["evaluate"],
        ["diagnose"],
        ["report"],
        ["export"],
        ["convert"],
        ["convert", "hf-to-nemo"],
        ["plan"],
        ["config"],
        ["doctor"],
    ],
    ids=lambda words: "-".join(words),
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from nemo_popsd.cli.main import main
try:
    main({[*words, "--help"]!r})
except SystemExit as stop:
    assert stop.code == 0
heavy = [name for name in ("torch", "omegaconf", "lightning", "nemo", "megatron") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["usage: popsd", *words]))
