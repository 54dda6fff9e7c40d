"""The documents, their blocks of code, and the code in their text."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/*.md", "benchmarks/*.md", "experiments/*.md", "nemo_popsd/**/*.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))
_BLOCK = re.compile(r"^ *```(?P<language>\w*)(?P<words>[^\n]*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    words: str
    """The words after the language: `run`, `shown-below`."""
    body: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of a page in `language`, in order."""
    found = [Block(page, b["language"], b["words"].strip(), b["body"]) for b in _BLOCK.finditer(text_of(page))]
    return [block for block in found if block.language == language]


def yaml_files() -> dict[str, str]:
    """The configurations that pages show as files: content by name, which is the comment in the first line."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if name := re.match(r"# (\w+\.yaml)\n", block.body):
                found[name[1]] = block.body
    return found


def without_blocks(page: str) -> str:
    """The text of a page outside its fenced blocks."""
    return _BLOCK.sub("", text_of(page))


def inline_code(page: str) -> list[str]:
    """The texts between backticks on a page, outside its blocks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def reference() -> ModuleType:
    """docs/reference.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
