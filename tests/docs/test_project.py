"""The length of the README, the single version, and the files that a package needs besides its code."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

import yaml

import nemo_popsd
from tests.docs.pages import PAGES, ROOT, text_of


def test_the_readme_fits_on_a_screen_and_a_half() -> None:
    assert len(text_of("README.md").splitlines()) <= 95


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nemo_popsd.__version__"}
    assert version("nemo_popsd") == nemo_popsd.__version__
    assert "version" not in yaml.safe_load(text_of("CITATION.cff"))


def test_the_wheel_states_that_the_package_is_typed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nemo_popsd"]
    assert "py.typed" in data
    assert (ROOT / "nemo_popsd" / "py.typed").is_file()


def test_the_changelog_names_the_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert nemo_popsd.__version__ in text_of("CHANGELOG.md")


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2607.02234"


def test_the_issue_form_asks_for_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    doctor = next(field for field in form["body"] if field.get("id") == "doctor")
    assert "popsd doctor --json" in doctor["attributes"]["label"]
    assert doctor["validations"] == {"required": True}


def test_every_promise_names_a_test_that_exists() -> None:
    promises = text_of("docs/promises.md").partition("## Honest limits")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 40
    for row in rows:
        tests = re.findall(r"`([\w/]+\.py)`", row.split("|")[-2])
        assert tests, row
        assert [name for name in tests if not (ROOT / "tests" / name).is_file()] == [], row


def test_pages_describe_the_present() -> None:
    for page in PAGES:
        if page.startswith("docs/") or page == "README.md":
            history = re.findall(r"(?i)an earlier engine|first testbed|no longer|used to be", text_of(page))
            assert not history, (page, history)
            assert f"{ROOT}/" not in text_of(page), f"{page} names the directory of this checkout"
