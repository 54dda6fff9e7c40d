"""The site is built, and a broken link or anchor ends the build. `make docs` makes the environment that this needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, reference

MKDOCS = ROOT / os.environ.get("DOCS_ENV", ".docs-venv") / "bin" / "mkdocs"
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "mkdocs.yml")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MKDOCS.is_file(), reason="mkdocs is not installed (make docs)"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the sources of the site."""
    for name in OUTSIDE:
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.jsonl")
    for name in ("docs", "benchmarks", "experiments", "nemo_popsd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    words = [str(MKDOCS), "build", "--strict"]
    return subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=300, env=environment)


def test_the_site_has_every_page_and_no_request_to_another_server(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stderr
    site = project / "build" / "site"
    pages = ["index", "architecture", "project/CHANGELOG", *(page.removesuffix(".md") for page in reference().PAGES)]
    for page in pages:
        assert (site / f"{page}.html").is_file(), page
    text = (site / "index.html").read_text()
    assert 'href="tour.html"' in text
    assert 'href="project/experiments/index.html"' in text
    assert not re.findall(r'<(?:script|link rel="stylesheet")[^>]*(?:src|href)="https?:', text)
    assert 'id="rollout.overlap"' in (site / "reference/settings.html").read_text()
    assert "PurifiedOPSDModel" in (site / "reference/api.html").read_text()
    assert not list(site.rglob("*.py"))


def test_a_broken_link_ends_the_build(project: Path) -> None:
    broken = {
        "docs/data.md": ["absent.md", "running.md#absent", "reference/settings.md#training.stepz"],
        "README.md": ["docs/gone.md"],
        "CONTRIBUTING.md": ["nemo_popsd/absent.py"],
    }
    for page, links in broken.items():
        with (project / page).open("a") as file:
            file.write("".join(f"\n[x]({link})\n" for link in links))
    done = build(project)
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for part in ("absent.md", "#absent", "#training.stepz", "gone.md", "nemo_popsd/absent.py"):
        assert any(part in line for line in warnings), part
    assert len(warnings) == 5
