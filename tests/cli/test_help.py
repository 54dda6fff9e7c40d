"""`--help` of every command, and the examples in it."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nemo_popsd.cli.main import build_parser
from tests.docs.command_checks import ROOT, check


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
        ["convert", "nemo-to-hf"],
        ["rollouts"],
        ["rollouts", "show"],
        ["data"],
        ["data", "check"],
        ["data", "convert"],
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


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser` and those of all its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inside in action.choices.values():
                yield from parsers(inside)


@pytest.mark.parametrize("parser", parsers(build_parser()), ids=lambda parser: parser.prog)
def test_every_command_has_examples_and_they_are_right(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert parser.epilog is not None, parser.prog
    heading, *examples = parser.epilog.splitlines()
    assert heading == ("examples:" if len(examples) > 1 else "example:")
    for line in examples:
        assert parser.prog.removeprefix("popsd") in line, "an example of another command"
        check(shlex.split(line))
    assert parser.epilog in parser.format_help(), "its lines are not wrapped"
