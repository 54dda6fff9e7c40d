"""HTML escaping and number formatting. All text is escaped here, since rollouts may contain any text."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n"} | {127: None}


def esc(value: object) -> str:
    """`value` as text for elements and quoted attributes, without the control characters that HTML forbids."""
    return html.escape(str(value).translate(_CONTROLS), quote=True)


def data_block(value: object, name: str) -> str:
    """`value` as JSON for the page's script, escaped so that its text cannot close the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{esc(name)}">{text}</script>'


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and grouped thousands; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 8:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return f"{value:,.{max(digits - 1 - size, 0)}f}".replace("-", MINUS)


def fixed(value: float | None, decimals: int = 1) -> str:
    """`value` with `decimals` decimals; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int = 1) -> str:
    """`value` with its sign and `decimals` decimals; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+,.{decimals}f}".replace("-", MINUS)
    return text[1:] if not text.strip(f"+{MINUS}0.,") else text


def table(header: Iterable[str], rows: Iterable[Iterable[str]], *, css: str = "") -> str:
    """A table of HTML cells that scrolls horizontally if too wide. The first cell of each line is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = []
    for row in rows:
        first, *rest = row
        body.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def card(title: str, body: str, *, note: str = "", css: str = "") -> str:
    """A titled box; `title` and `note` are text, `body` is HTML."""
    subtitle = f'<p class="note">{esc(note)}</p>' if note else ""
    return f'<section class="card {css}"><h3>{esc(title)}</h3>{subtitle}{body}</section>'


def visible(text: str) -> str:
    """A token's text as HTML with visible white space."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return esc(shown) or "<i>empty</i>"
