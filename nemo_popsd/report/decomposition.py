"""Plots and tables of the paper's decomposition: by position, by entropy, for markers, and the push of components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from nemo_popsd.diagnosis.schema import Group, Spread, Summary
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS
from nemo_popsd.report.bars import push_chart
from nemo_popsd.report.markup import card, esc, fixed, number, signed, table, visible
from nemo_popsd.report.plots import Series, line_plot

COMPONENTS = {
    "reference": ("Δ_ref: the reference alone", "log π_ref − log π_θ. Induced by the reference; not transferable."),
    "question": ("Δ_it: the question, given the reference", "log π_T − log π_ref. Purified OPSD keeps this part."),
    "total": ("Δ_total: the complete teacher signal", "log π_T − log π_θ. Plain OPSD follows this signal."),
    "target": ("The target of this run", "log P − log π_θ. Training moves the student in this direction."),
}
"""Title and meaning of each component, in the order shown."""
SHORT = {"reference": "Δ_ref", "question": "Δ_it", "total": "Δ_total", "target": "target"}
"""Short names of the components."""

_BY_GROUP = {
    **{statistic.name: (statistic.symbol, statistic.meaning) for statistic in SIGNAL_STATISTICS},
    "delta_question": ("Δ_it of the generated token", "nats; above 0: the question, given the reference, favours it"),
    "delta_reference": ("Δ_ref of the generated token", "nats; below 0: the reference alone disfavours it"),
    **{statistic.name: (statistic.symbol, f"{statistic.unit}; {statistic.meaning}") for statistic in TOKEN_STATISTICS},
}
_NAMES = {
    **{statistic.name: statistic.symbol for statistic in SIGNAL_STATISTICS},
    "delta_total": "Δ_total of the generated token",
    "delta_reference": "Δ_ref of the generated token",
    "delta_question": "Δ_it of the generated token",
    "delta_target": "log P − log π_θ of the generated token",
    **{statistic.name: statistic.symbol for statistic in TOKEN_STATISTICS},
}


def position_plots(summaries: Sequence[tuple[str, str, Summary]]) -> str:
    """Plots by position in the response. Each of `summaries` is (label, colour class, summary)."""
    return _plots(summaries, "position", "token", _middle)


def entropy_plots(summaries: Sequence[tuple[str, str, Summary]]) -> str:
    """Plots by bin of the student's entropy."""
    return _plots(summaries, "entropy", "nats", None)


def _middle(group: Group) -> float:
    return (float(group["from"]) + float(group["to"]) - 1) / 2


def _plots(
    summaries: Sequence[tuple[str, str, Summary]],
    grouping: Literal["position", "entropy"],
    x_label: str,
    x_of: Callable[[Group], float] | None,
) -> str:
    """One card per statistic; with a single summary, a band shows the quartiles."""
    names = () if x_of else [_bin_name(group) for group in summaries[0][2]["groups"][grouping]]
    cards = []
    for measure, (title, note) in _BY_GROUP.items():
        series = []
        for label, css, summary in summaries:
            points, band = [], []
            for index, group in enumerate(summary["groups"][grouping]):
                spread = group.get(measure)
                if spread:
                    x = x_of(group) if x_of else float(index)
                    points.append((x, spread["mean"]))
                    band.append((x, spread["q25"], spread["q75"]))
            series.append(Series(label, points, css, band if len(summaries) == 1 else ()))
        plot = line_plot(series, label=title, x_label=x_label, markers=True, x_names=names)
        cards.append(card(title, plot, note=note))
    return f'<div class="grid">{"".join(cards)}</div>'


def _bin_name(group: Group) -> str:
    if group["to"] is None:
        return f"≥{group['from']:g}"
    return f"<{group['to']:g}"


def markers_table(summary: Summary) -> str:
    """Each statistic for marker tokens, other tokens and all tokens."""
    groups = summary["groups"]
    shown: tuple[Literal["markers", "others", "all"], ...] = ("markers", "others", "all")
    header = ["", *(f"{name}<br>{groups[name]['tokens']:,} tokens" for name in shown)]
    rows = [
        [esc(_NAMES[measure]), *(_spread(groups[name].get(measure), measure) for name in shown)] for measure in _NAMES
    ]
    return table(header, rows)


def _spread(spread: Spread | None, measure: str) -> str:
    if not spread:
        return "–"
    text = signed if measure.startswith(("delta", "cosine")) else fixed
    return f"{text(spread['mean'], 2)}<small>{text(spread['q25'], 2)} … {text(spread['q75'], 2)}</small>"


def push_cards(summary: Summary, components: Sequence[str] = tuple(COMPONENTS), *, count: int = 10) -> str:
    """For each component, the vocabulary entries that it promotes and suppresses most."""
    cards = []
    for name in components:
        title, note = COMPONENTS[name]
        lists = summary["push"]["components"][name]
        parts = []
        for direction in ("promoted", "suppressed"):
            entries = [(entry["text"], push) for entry in lists[direction][:count] if (push := entry["push"][name])]
            parts.append(push_chart(entries, label=f"most {direction} by {title}"))
        cards.append(card(title, f'{parts[0]}<div class="split"></div>{parts[1]}', note=note))
    css = "two" if len(cards) in (2, 4) else "three"
    return f'<div class="{css}">{"".join(cards)}</div>'


def marker_push_table(summary: Summary) -> str:
    """The push of each component on markers that are a single token."""
    rows = []
    for marker, entry in summary["push"]["markers"].items():
        if entry is None:
            rows.append([esc(marker), "–", *["–"] * len(COMPONENTS)])
            continue
        cells = [_relative(entry["push"][name], entry["mass"]) for name in COMPONENTS]
        rows.append([esc(marker), number(entry["mass"], 2), *cells])
    header = ["", "expected per 1,000 tokens", *(esc(title.split(":")[0]) for title, _ in COMPONENTS.values())]
    return table(header, rows)


def _relative(push: float | None, mass: float | None) -> str:
    if push is None or not mass:
        return "–"
    css = "up-text" if push > 0 else "down-text"
    return f'<span class="{css}">{signed(push, 2)}</span><small>{signed(100 * push / mass, 0)} %</small>'


def chips(summary: Summary, component: str, count: int = 6) -> str:
    """The entries that a component promotes and suppresses most, as two lists of chips."""
    lists = summary["push"]["components"][component]
    lines = []
    directions: tuple[tuple[Literal["promoted", "suppressed"], str, int], ...]
    directions = (("promoted", "up", 1), ("suppressed", "down", -1))
    for direction, css, sign in directions:
        strongest = [entry for entry in lists[direction][:count] if (entry["push"][component] or 0) * sign > 0]
        items = "".join(f'<li class="{css}"><code>{visible(entry["text"])}</code></li>' for entry in strongest)
        lines.append(f'<p class="sub">{direction}</p><ul class="chips">{items or "<li>nothing</li>"}</ul>')
    return "".join(lines)
