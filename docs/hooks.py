"""Hooks of mkdocs: the generated pages, the documents beside docs/, and links between the two.

Links in a Markdown file are those of the repository, so that they work where the repository is read. In the site a
document from outside docs/ lies below project/, and files that are not part of the site have no page: a link to one
becomes its text, and is an error if the file is missing.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import reference  # noqa: E402

logger = logging.getLogger("mkdocs.hooks.docs")

OUTSIDE = ("*.md", "benchmarks/*.md", "experiments/*.md", "experiments/plots/*.svg")
"""What the site takes from outside docs/."""
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^(\s*```\w+) [^\n]*$", re.MULTILINE)
_CODE = re.compile(r"(^\s*```.*?^\s*```\s*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def site_path(path: str) -> str | None:
    """Where a file of the repository is in the site; None if it is not part of it."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"project/{path}" if path in outside() else None


def repository_path(site: str) -> str:
    """Where a page of the site is in the repository."""
    if site == "index.md":
        return "README.md"
    return site.removeprefix("project/") if site.startswith("project/") else f"docs/{site}"


@cache
def outside() -> list[str]:
    """The files that the site takes from outside docs/."""
    return [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and the documents beside docs/."""
    for path, write in reference.PAGES.items():
        files.append(File.generated(config, path, content=write()))
    for name in outside():
        files.append(File.generated(config, str(site_path(name)), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them; words after the language of a block are for the tests."""
    own = page.file.src_uri
    parts = _CODE.split(_FENCE.sub(r"\1", markdown))
    return "".join(
        part if index % 2 else _LINK.sub(lambda link: linked(link, own), part) for index, part in enumerate(parts)
    )


def linked(link: re.Match[str], own: str) -> str:
    """A Markdown link on the page `own` of the site."""
    target, anchor = link["target"], link["anchor"] or ""
    if not target or re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(own)), target))
    site = site_path(path)
    if site is None:
        if not (ROOT / path).exists():
            logger.warning("%s: the link to %s leads to no file of the repository", own, target)
        return link["text"]
    there = posixpath.relpath(site, posixpath.dirname(own) or ".")
    return f"{link['image']}[{link['text']}]({there}{anchor})"
