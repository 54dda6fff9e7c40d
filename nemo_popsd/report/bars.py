"""Charts with named entries: intervals on a common scale, bars on both sides of 0, and parts of a total."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_popsd.report.markup import esc, fixed, number, visible
from nemo_popsd.report.plots import nice_ticks, tick_texts

_WIDTH = 340.0
_LONGEST_NAME = 36


@dataclass(frozen=True)
class Estimate:
    """One measured number with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    css: str


def interval_chart(rows: Sequence[Estimate], *, label: str, text: Callable[[float], str] = fixed) -> str:
    """Shows each entry's value as a dot and its interval as a line, on a common scale, below its name and value."""
    edges = [
        edge for row in rows for edge in (row.value, row.low, row.high) if edge is not None and math.isfinite(edge)
    ]
    if not edges:
        return '<p class="absent">not measured</p>'
    ticks = nice_ticks(min(edges), max(edges), 4)
    left, right, row_height = 12.0, 14.0, 34.0
    height = row_height * len(rows) + 22

    def at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - left - right)

    parts = [
        f'<path class="grid" d="M{at(tick):.1f} 4V{height - 20:.0f}"/>'
        f'<text x="{at(tick):.1f}" y="{height - 6:.0f}" text-anchor="middle">{esc(name)}</text>'
        for tick, name in zip(ticks, tick_texts(ticks), strict=True)
    ]
    for index, row in enumerate(rows):
        top = index * row_height
        middle = top + 24
        if row.low is not None and row.high is not None:
            parts.append(f'<path class="whisker {esc(row.css)}" d="M{at(row.low):.1f} {middle}H{at(row.high):.1f}"/>')
        parts.append(f'<circle class="dot {esc(row.css)}" cx="{at(row.value):.1f}" cy="{middle}" r="4.5"/>')
        parts.append(f'<text class="name" x="{left:.0f}" y="{top + 14:.0f}">{esc(_short(row.label))}</text>')
        position = f'x="{_WIDTH - 4:.0f}" y="{top + 14:.0f}"'
        parts.append(f'<text class="value" {position} text-anchor="end">{esc(text(row.value))}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{esc(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _short(label: str) -> str:
    """`label`, shortened to leave space for the value."""
    return label if len(label) <= _LONGEST_NAME else label[: _LONGEST_NAME - 1] + "…"


def push_chart(entries: Sequence[tuple[str, float]], *, label: str, tokens: bool = True) -> str:
    """Named bars on both sides of 0 (right: promoted, left: suppressed), as an HTML list.

    Args:
        entries: name and value, in order.
        label: description of the chart, for screen readers.
        tokens: whether the names are tokens; their white space is then made visible.
    """
    if not entries:
        return '<p class="absent">not measured</p>'
    most = max(abs(value) for _, value in entries) or 1.0
    rows = []
    for name, value in entries:
        side = "up" if value > 0 else "down"
        rows.append(
            f'<li><code>{visible(name) if tokens else esc(name)}</code><span class="track"><i class="{side}" '
            f'style="width:{abs(value) / most * 50:.1f}%"></i></span><b>{esc(_signed(value))}</b></li>'
        )
    return f'<ol class="push" aria-label="{esc(label)}">{"".join(rows)}</ol>'


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value, 2)


def share_bar(parts: Sequence[tuple[str, float, str]], *, label: str) -> str:
    """A bar divided in proportion to `parts`, each (name, amount, class)."""
    total = sum(amount for _, amount, _ in parts) or 1.0
    cells = "".join(
        f'<i class="{esc(css)}" style="width:{100 * amount / total:.2f}%" title="{esc(name)}"></i>'
        for name, amount, css in parts
    )
    legend = "".join(
        f'<li><i class="swatch {esc(css)}"></i>{esc(name)} <b>{100 * amount / total:.0f} %</b></li>'
        for name, amount, css in parts
    )
    return f'<div class="share" role="img" aria-label="{esc(label)}">{cells}</div><ul class="legend">{legend}</ul>'
