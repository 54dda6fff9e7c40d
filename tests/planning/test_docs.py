"""docs/planning.md shows what its commands print. `python -m tests.planning.test_docs` rewrites the outputs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.planning.command import plan_text
from nemo_popsd.planning.sizes import embedded_models

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "planning.md"
_FENCE = "```bash shown-below\n"
_BLOCK = re.compile(_FENCE + r"(?P<command>[^\n]*)\n```\n\n(?P<output>```text\n.*?```\n|(?:\|[^\n]*\n)*)", re.DOTALL)


def printed(command: str) -> str:
    """What `command` prints: a table as it is, anything else fenced."""
    program, name, conf, *words = shlex.split(command)
    assert (program, name) == ("popsd", "plan")
    fastest, explain = "--fastest" in words, "--explain" in words
    settings = [word for word in words if not word.startswith("--")]
    try:
        text = plan_text(
            ROOT / conf,
            settings,
            fastest_layout=fastest,
            explain=explain,
            sharing="--sharing" in words,
            simulated="--simulate" in words,
            failures="--failures" in words,
        )
    except UserError as error:
        text = "\n".join([f"popsd: error: {error}", *error.advice])
    return f"{text}\n" if text.startswith("|") else f"```text\n{text}\n```\n"


def rewritten(page: str) -> str:
    """`page` with the present outputs of its commands."""
    return _BLOCK.sub(lambda found: f"{_FENCE}{found['command']}\n```\n\n{printed(found['command'])}", page)


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print() -> None:
    page = PAGE.read_text()
    assert len(_BLOCK.findall(page)) == page.count(_FENCE) > 5
    for found in _BLOCK.finditer(page):
        assert found["output"] == printed(found["command"]), (
            f"{found['command']}\nrun python -m tests.planning.test_docs"
        )


def test_the_console_prints_the_same() -> None:
    command = next(_BLOCK.finditer(PAGE.read_text()))["command"]
    words = [sys.executable, "-m", "nemo_popsd", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f"```text\n{done.stdout}```\n" == printed(command)


def test_the_page_names_the_models_that_ship() -> None:
    page = PAGE.read_text()
    assert all(name in page for name in embedded_models())


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
