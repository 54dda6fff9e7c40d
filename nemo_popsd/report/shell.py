"""The HTML document of a page: style, script, and a security policy that blocks all other resources."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from nemo_popsd import __version__
from nemo_popsd.errors import UserError
from nemo_popsd.report.markup import esc

_GENERATOR = '<meta name="generator" content="nemo_popsd'


def document(title: str, over: str, header: str, body: str) -> str:
    """A complete page.

    The content security policy allows only inline styles and the page's script (by digest), so even unescaped text of a
    rollout could not run a script.

    Args:
        title: title of the page, as text.
        over: small line above the title, as text.
        header: HTML below the title.
        body: HTML of the sections.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_GENERATOR} {esc(__version__)}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<header><div class="over">{esc(over)}</div><h1>{esc(title)}</h1>{header}</header>
<main>{body}</main>
<footer>nemo_popsd {esc(__version__)}. This page is self-contained and loads no other resources.</footer>
<script>{script}</script>
</body>
</html>
"""


def refuse_another_file(page: Path) -> None:
    """Refuses to replace a file that is not a page of nemo_popsd, as identified by a `meta` element in its head.

    Raises:
        UserError: `page` is a different kind of file.
    """
    reason = None
    if page.is_symlink():
        reason = f"a symbolic link to {os.readlink(page)}"
    elif page.exists():
        reason = "something other than a regular file"
        if page.is_file():
            with page.open("rb") as file:
                reason = None if _GENERATOR.encode() in file.read(4096) else "a file that is not a page of nemo_popsd"
    if reason:
        raise UserError(
            f"page {page}",
            got=f"{reason}, where the page would be written",
            need="a path that does not exist, or a page of nemo_popsd",
            fix=f"set --output to another file, or move {page} away; nothing was changed",
        )


@cache
def _asset(name: str) -> str:
    return files("nemo_popsd.report").joinpath("assets", name).read_text(encoding="utf-8")
