"""Line plots with bands as inline SVG, and legends. The page's style sheet defines the colours.

A plot is 340 units wide, which is about its width in pixels on phones and on desktops, so that the size of its text is
constant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_popsd.report.markup import MINUS, esc, fixed, number

WIDTH, HEIGHT = 340.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0
MOST_POINTS = 800
"""Maximum number of points of a line; more cannot be distinguished."""
PALETTE = 6
"""Number of colours for runs in the style sheet, s1 to s6; further runs reuse them."""


def series_class(index: int) -> str:
    """CSS class of the run with this index, counted from 0."""
    return f"s{index % PALETTE + 1}"


@dataclass(frozen=True)
class Series:
    """A line of a plot."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y); points with a non-finite y are omitted."""
    css: str
    """Colour class: "base" or a class from `series_class`, plus "dashed" for a dashed line."""
    band: Sequence[tuple[float, float, float]] = field(default=())
    """(x, low, high) of an interval around the line."""

    def drawable(self) -> list[tuple[float, float]]:
        """The finite points; above `MOST_POINTS`, only the lowest and highest point of each segment."""
        points = [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]
        if len(points) <= MOST_POINTS:
            return points
        size = math.ceil(len(points) / (MOST_POINTS // 2))
        kept: list[tuple[float, float]] = []
        for start in range(0, len(points), size):
            segment = points[start : start + size]
            kept += sorted({min(segment, key=lambda point: point[1]), max(segment, key=lambda point: point[1])})
        return kept


@dataclass(frozen=True)
class Event:
    """An event at one x."""

    x: float
    text: str
    """Text shown under the pointer and read by screen readers."""
    css: str
    """Colour class, as for a `Series`."""


def line_plot(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    format_y: Callable[[float], str] = number,
    unit: str = "",
    zero: bool = False,
    markers: bool = False,
    x_names: Sequence[str] = (),
    height: float = HEIGHT,
    events: Sequence[Event] = (),
) -> str:
    """Draws a line per series, and includes the data for the page's script, which shows values under the pointer.

    Args:
        series: at least one series; those without points are not drawn.
        label: description of the plot, for screen readers.
        x_label: label of the x axis.
        format_y: formats a value under the pointer.
        unit: text after the numbers of the y axis, e.g. "%".
        zero: whether the y axis must include 0.
        markers: whether to draw a dot at every point.
        x_names: names of x = 0, 1, ... for a categorical axis.
        height: height of the plot, in the units of `WIDTH`.
        events: events, drawn as vertical lines.
    """
    drawn = [(s, s.drawable()) for s in series]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    ys += [edge for s in series for _, low, high in s.band for edge in (low, high) if math.isfinite(edge)]
    if not xs:
        return '<p class="absent">not measured</p>'
    ticks_y = nice_ticks(min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys), round(height / 42))
    low_y, high_y = ticks_y[0], ticks_y[-1]
    low_x, high_x = (0.0, len(x_names) - 1.0) if x_names else (min(xs), max(xs))
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, height - BOTTOM - (y - low_y) / (high_y - low_y) * (height - TOP - BOTTOM)

    named = dict(enumerate(x_names))
    integers = all(float(x).is_integer() for x in xs)
    ticks_x = [(float(x), name) for x, name in named.items()]
    ticks_x = ticks_x or [(tick, _plain(tick)) for tick in _ticks_inside(low_x, high_x, integers)]
    positions = [(at(tick, low_y)[0], name) for tick, name in ticks_x]
    parts = [_grid(ticks_y, at, low_x, unit), _x_axis(positions, x_label, height - 8)]
    if low_y < 0 < high_y:
        parts.append(_path("zero", [at(low_x, 0), at(high_x, 0)]))
    for s, _ in drawn:
        if s.band:
            edges = [at(x, high) for x, _, high in s.band] + [at(x, low) for x, low, _ in reversed(s.band)]
            parts.append(f'<path class="band {esc(s.css)}" d="{_points(edges)}Z"/>')
    for event in events:
        across, down = at(min(max(event.x, low_x), high_x), low_y)
        parts.append(
            f'<path class="event {esc(event.css)}" d="M{across:.1f} {TOP:.0f}V{down:.1f}">'
            f"<title>{esc(event.text)}</title></path>"
        )
    for s, points in drawn:
        if points:
            parts.append(_path(f"line {s.css}", [at(x, y) for x, y in points]))
        if markers or len(points) == 1:
            for x, y in points:
                across, down = at(x, y)
                parts.append(f'<circle class="dot {esc(s.css)}" cx="{across:.1f}" cy="{down:.1f}" r="2.6"/>')
    hover = [
        {
            "name": s.label,
            "css": s.css,
            "points": [
                [*(round(value, 1) for value in at(x, y)), named.get(int(x)) or _plain(x), format_y(y)]
                for x, y in points
            ],
        }
        for s, points in drawn
        if points
    ]
    data = esc(json.dumps({"x": x_label, "series": hover}, ensure_ascii=False, separators=(",", ":")))
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{esc(label)}" '
        f'data-plot="{data}">{"".join(parts)}<g class="cursor"></g></svg>'
    )


def legend(series: Sequence[tuple[str, str]]) -> str:
    """A line of colour swatches. Each entry of `series` is (label, class)."""
    items = "".join(f'<li><i class="swatch {esc(css)}"></i>{esc(label)}</li>' for label, css in series)
    return f'<ul class="legend">{items}</ul>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, at least two, that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The labels of the ticks of an axis, all with the number of decimals that their spacing needs."""
    step, largest = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if step < 1e-4 or largest >= 1e6:
        short = (f"{tick:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS) for tick in ticks)
        return ["0" if abs(tick) < step * 1e-6 else text for tick, text in zip(ticks, short, strict=True)]
    decimals = next(d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d)
    return [fixed(0.0 if abs(tick) < step * 1e-6 else tick, decimals) for tick in ticks]


def _grid(ticks: Sequence[float], at: Callable[[float, float], tuple[float, float]], low_x: float, unit: str) -> str:
    parts = []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        _, down = at(low_x, tick)
        parts.append(
            f'<path class="grid" d="M{LEFT:.0f} {down:.1f}H{WIDTH - RIGHT:.0f}"/>'
            f'<text x="{LEFT - 6:.0f}" y="{down + 3.5:.1f}" text-anchor="end">{esc(text + unit)}</text>'
        )
    return "".join(parts)


def _ticks_inside(low: float, high: float, integers: bool) -> list[float]:
    inside = [tick for tick in nice_ticks(low, high, 4) if low <= tick <= high]
    return [tick for tick in inside if float(tick).is_integer()] if integers else inside


def _plain(value: float) -> str:
    text = number(value, 6)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _x_axis(positions: Sequence[tuple[float, str]], label: str, down: float) -> str:
    """The tick labels, without those that would overlap the previous one, and the label of the axis."""
    parts = []
    free = LEFT - 8
    for across, name in positions:
        width = 6.2 * len(name)
        anchor, start = "middle", across - width / 2
        if start + width > WIDTH:
            anchor, start = "end", across - width
        elif start < LEFT - 4:
            anchor, start = "start", across - 3
        if start < free:
            continue
        free = start + width + 10
        x = start if anchor == "start" else across
        parts.append(f'<text x="{x:.1f}" y="{down:.0f}" text-anchor="{anchor}">{esc(name)}</text>')
    parts.append(f'<text class="axis" x="{LEFT - 8:.0f}" y="{down:.0f}" text-anchor="end">{esc(label)}</text>')
    return "".join(parts)


def _path(css: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<path class="{esc(css)}" d="{_points(points)}"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
