"""The tables of held-out figures."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_popsd.report.markup import card, esc, fixed, signed, table
from nemo_popsd.report.plots import Series, line_plot, series_class
from nemo_popsd.report.run import RunData, Validation, flat_figures
from nemo_popsd.report.verdicts import change, estimate

FIGURES = {
    "accuracy": ("accuracy, %", 100.0),
    "majority": ("majority vote, %", 100.0),
    "pass_at.": ("pass@{}, %", 100.0),
    "markers_per_1000_tokens": ("markers per 1,000 tokens", 1.0),
    "marker_rates.": ("{}", 1.0),
    "segments": ("reflection segments per answer", 1.0),
    "mean_tokens": ("tokens per answer", 1.0),
    "closed_thinking_share": ("closes its thinking, %", 100.0),
    "repeated_share": ("repeated word sequences, %", 100.0),
    "looping_share": ("ends in a loop, %", 100.0),
    "cut_share": ("cut at the limit, %", 100.0),
    "unanswered_share": ("without an answer, %", 100.0),
    "undecided_share": ("comparison given up, %", 100.0),
}
"""Title and scale of each figure of a summary, in order; a name that ends in a dot stands for all that begin so."""

_LOW = 112.0


def evaluation(runs: Sequence[RunData]) -> str:
    """Held-out figures before and after training, then evaluations made by command."""
    columns: list[tuple[RunData | None, str, Validation | None]] = [(None, "before", runs[0].before)]
    columns += [(run, run.name, run.after) for run in runs]
    if all(found is None for _, _, found in columns):
        told = '<p class="absent">No validation was run (data.validation.path).</p>'
    else:
        told = card("Held-out problems", _table(columns), note=_note(runs))
    return told + _marker_curves(runs) + _commanded(runs)


def _marker_curves(runs: Sequence[RunData]) -> str:
    """The rate of each marker by step, with intervals."""
    every = {name for run in runs for found in run.validations.values() for name in found.values}
    cards = []
    for name, marker, _ in _figures({name for name in every if name.startswith("marker_rates.")}):
        series = []
        for index, run in enumerate(runs):
            known = [(float(step), found) for step, found in run.validations.items() if name in found.values]
            points = [(step, found.values[name]) for step, found in known]
            band = [(step, *found.intervals[name]) for step, found in known if name in found.intervals]
            series.append(Series(run.name, points, series_class(index), band))
        plot = line_plot(series, label=f"{marker} per 1,000 tokens", zero=True, markers=True, height=_LOW)
        cards.append(card(f"“{marker}”", plot, note="per 1,000 tokens of held-out answers"))
    return f'<div class="grid sample">{"".join(cards)}</div>' if cards else ""


def _note(runs: Sequence[RunData]) -> str:
    note = f"“before” is that of {runs[0].name}. Small: interval, then the change from each run’s own start."
    differing = [
        run.name for run in runs if run.before and runs[0].before and run.before.values != runs[0].before.values
    ]
    return note + (f" {', '.join(differing)} started from other figures." if differing else "")


def _table(columns: Sequence[tuple[RunData | None, str, Validation | None]]) -> str:
    present = {name for _, _, found in columns if found for name in found.values}
    rows = []
    for name, title, scale in _figures(present):
        cells = [_cell(found, name, scale, run) for run, _, found in columns]
        rows.append(
            [f'<span class="inner">{esc(title)}</span>' if name.startswith("marker_rates.") else esc(title), *cells]
        )
    for name in ("problems", "samples"):
        rows.append([name, *(fixed(found.values.get(name), 0) if found else "–" for _, _, found in columns)])
    return table(["", *(esc(name) for _, name, _ in columns)], rows)


def _figures(present: set[str]) -> list[tuple[str, str, float]]:
    """(name, title, scale) of the figures that are there."""
    found = []
    for name, (title, scale) in FIGURES.items():
        if not name.endswith("."):
            found += [(name, title, scale)] if name in present else []
            continue
        inner = [other.removeprefix(name) for other in present if other.startswith(name)]
        ordered = sorted(inner, key=lambda key: (int(key) if key.isdigit() else 0, key))
        found += [(name + key, title.format(key), scale) for key in ordered]
    return found


def _cell(found: Validation | None, name: str, scale: float, run: RunData | None) -> str:
    figure = estimate(found, name, scale)
    if figure is None:
        return "–"
    text = fixed(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f"<small>{fixed(figure.low)} … {fixed(figure.high)}</small>"
    moved = change(run, name, scale) if run else None
    if moved is None:
        return text
    css = ""
    if moved.low is not None and moved.high is not None and not moved.low <= 0 <= moved.high:
        css = ' class="moved"'
    between = f" [{signed(moved.low)}, {signed(moved.high)}]" if moved.low is not None else ""
    return f"{text}<small{css}>{signed(moved.value)}{between}</small>"


def _commanded(runs: Sequence[RunData]) -> str:
    """Evaluations made by `popsd evaluate` into the directories of the runs."""
    rows = []
    for run in runs:
        for entry in run.evaluations:
            found = Validation(*flat_figures(entry))
            title = " · ".join(str(entry[key]) for key in ("model", "set") if key in entry) or run.name
            cells = [_cell(found, name, FIGURES[name][1], None) for name in _COMMANDED]
            rows.append([esc(title), *cells, fixed(found.values.get("samples"), 0)])
    if not rows:
        return ""
    header = ["", *(esc(FIGURES[name][0]) for name in _COMMANDED), "samples"]
    return card("Further evaluations", table(header, rows), css="sample")


_COMMANDED = ("accuracy", "majority", "markers_per_1000_tokens", "mean_tokens", "cut_share")
