"""Comments and docstrings cite functions of libraries by dotted names that exist in the installed versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.citations import cited_source

PACKAGE = Path(__file__).parents[1] / "nemo_popsd"
LIBRARIES = ("megatron", "transformer_engine", "lightning", "nemo", "vllm", "transformers", "peft")
CITATION = re.compile(rf"`((?:{'|'.join(LIBRARIES)})(?:\.\w+)+)`")
LINE_OF_A_FILE = re.compile(r"\w\.(?:py|cpp|cu|h):\d+")
IGNORED_TAILS = ("py", "json", "md")
SETTINGS = ("megatron.model", "megatron.ddp", "megatron.optimizer")
"""Sections of the configuration, not modules."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def citations() -> list[tuple[str, str]]:
    """Each cited name, with the first file that cites it."""
    cited: dict[str, str] = {}
    for file in sources():
        for name in CITATION.findall(file.read_text()):
            if name not in SETTINGS and name.rpartition(".")[2] not in IGNORED_TAILS:
                cited.setdefault(name, str(file.relative_to(PACKAGE)))
    return sorted(cited.items())


@pytest.mark.parametrize(("name", "file"), citations(), ids=lambda value: value)
def test_cited_names_exist_in_the_installed_library(name: str, file: str) -> None:
    if cited_source(name) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")


def test_no_file_cites_a_line_of_a_library() -> None:
    cited = {
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for file in sources()
        for line in file.read_text().splitlines()
        if LINE_OF_A_FILE.search(line)
    }
    assert cited == set()


def test_a_name_that_the_library_does_not_have_is_reported() -> None:
    assert "def forward" in str(cited_source("megatron.core.models.gpt.gpt_model.GPTModel.forward"))
    assert cited_source("no_such_library.module.function") is None
    for name in ("megatron.core.models.gpt.gpt_model.GPTModel.backwards", "megatron.core.no_such_module.function"):
        with pytest.raises(LookupError):
            cited_source(name)
