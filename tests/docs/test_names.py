"""Names, folders and versions that the documents state are those of the code, and lines can be read in an editor."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest

from tests.docs.pages import PAGES, ROOT, inline_code, text_of, without_blocks
from tests.test_architecture import PACKAGE, graph, upward

OTHER_PROGRAMS = {"TORCH_NCCL_TRACE_BUFFER_SIZE"}
"""Names that belong to programs outside the repository, and do not occur in its sources."""
LONGEST_LINE = 140
SUFFIXES = (".py", ".sh", ".js", ".yaml", ".yml", ".toml", "Makefile", "Dockerfile")


@cache
def words_of_sources() -> frozenset[str]:
    """Every identifier in a file of the repository that is not a document."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = [name for name in files if name.endswith(SUFFIXES)]
    assert len(sources) > 300
    return frozenset(word for name in sources for word in re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")))


def missing_names(codes: list[str]) -> list[str]:
    """The dotted identifiers of `codes` with a part that no source contains; plain lower-case words are skipped."""
    names = [code for code in codes if re.fullmatch(r"[A-Za-z_]\w*(?:\.(?!py$)[A-Za-z_]\w*)*", code)]
    parts = {name: set(name.split(".")) - OTHER_PROGRAMS for name in names if re.search(r"[A-Z_]", name)}
    return [name for name, of_name in parts.items() if not of_name <= words_of_sources()]


def test_a_missing_name_is_detected() -> None:
    absent = ["Target.absent" + "_field", "Absent" + "Class"]  # in two parts, since this file is a source, too
    assert missing_names([*absent, "Target", "Target.purified", "UserError", "word"]) == absent


@pytest.mark.parametrize("page", PAGES)
def test_names_of_code_in_a_page_exist(page: str) -> None:
    assert missing_names(inline_code(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_folders_of_the_repository_in_a_page_exist(page: str) -> None:
    folders = [code for code in inline_code(page) if re.fullmatch(r"(?:[\w.-]+/)+", code)]
    own = [code for code in folders if code.split("/")[0] in ("nemo_popsd", "tests", "docs", "benchmarks", "slurm")]
    assert [code for code in own if not (ROOT / code).is_dir()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "/RESULTS" not in page])
def test_lines_outside_tables_and_blocks_are_short(page: str) -> None:
    lines = [line for line in without_blocks(page).splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_the_same_number_of_cells(page: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", without_blocks(page), re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, table


def test_the_architecture_page_lists_the_folders_in_the_order_of_imports() -> None:
    listing = text_of("docs/architecture.md").partition("```text\nnemo_popsd/\n")[2].partition("```")[0]
    folders = re.findall(r"^  (\w+)/", listing, re.MULTILINE)
    edges = graph(PACKAGE)
    assert sorted(["errors", "__main__", *folders]) == sorted({*edges})
    assert upward(edges, [["errors"], *([folder] for folder in folders), ["__main__"]]) == []


def test_the_support_page_states_the_versions_of_the_requirements() -> None:
    versions_of = r" \| ([\d.]+)[^|]*" * 3
    rows = re.findall(rf"^\| ([\w-]+) \| [^|]+{versions_of} \|$", text_of("docs/support.md"), re.MULTILINE)
    assert [row[0] for row in rows][:2] == ["Python", "torch"]
    columns = (("26.02", "runtime"), ("26.08", "runtime"), ("26.02", "container"))
    for column, (stack, lock) in enumerate(columns, start=1):
        lines = "\n".join(text_of(f"requirements/{stack}/{name}.txt") for name in (lock, "bridge", "te"))
        pins = dict(re.findall(r"^([\w-]+)(?:\[[^\]]*\])?==([\w.]+)", lines, re.MULTILINE))
        versions = {name.replace("_", "-"): version for name, version in pins.items()}
        for row in rows[1:]:
            assert versions[row[0].replace("_", "-")] == row[column], (row[0], lock)
