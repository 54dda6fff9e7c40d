"""Pages show what their `popsd plan` commands print. `python -m tests.planning.test_docs` rewrites the outputs."""

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
PAGES = [PAGE, ROOT / "docs" / "full_size.md"]
_FENCE = "```bash shown-below\n"
_BLOCK = re.compile(_FENCE + r"(?P<command>[^\n]*)\n```\n\n(?P<output>```text\n.*?```\n|(?:\|[^\n]*\n)*)", re.DOTALL)


def printed(command: str) -> str:
    """The output of `command`: a table unchanged, anything else fenced."""
    program, name, conf, *words = shlex.split(command)
    assert (program, name) == ("popsd", "plan")
    flags = {name: f"--{name}" in words for name in ("explain", "sharing", "evaluation", "failures")}
    flags["simulated"] = "--simulate" in words
    settings = [word for word in words if not word.startswith("--")]
    try:
        text = plan_text(ROOT / conf, settings, fastest_layout="--fastest" in words, **flags)
    except UserError as error:
        text = "\n".join([f"popsd: error: {error}", *error.advice])
    return f"{text}\n" if text.startswith("|") else f"```text\n{text}\n```\n"


def rewritten(page: str) -> str:
    """`page` with the present outputs of its commands."""
    return _BLOCK.sub(lambda found: f"{_FENCE}{found['command']}\n```\n\n{printed(found['command'])}", page)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_what_its_commands_print(path: Path) -> None:
    page = path.read_text()
    assert len(_BLOCK.findall(page)) == page.count(_FENCE) > 2
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
    for path in PAGES:
        path.write_text(rewritten(path.read_text()))
