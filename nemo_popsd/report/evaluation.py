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
    if any(run.validations for run in runs):
        told = _held_out(runs)
    else:
        told = '<p class="absent">No validation was run (data.validation.path).</p>'
    return told + _marker_curves(runs) + _commanded(runs)


def _marker_curves(runs: Sequence[RunData]) -> str:
    """The rate of each marker by step, with intervals; markers that never occur are left out."""
    every = [found for run in runs for found in run.validations.values()]
    cards = []
    for name, marker, _ in _figures(every):
        if not name.startswith("marker_rates.") or not any(found.values.get(name) for found in every):
            continue
        series = []
        for index, run in enumerate(runs):
            known = [(float(step), found) for step, found in run.validations.items() if name in found.values]
            points = [(step, found.values[name]) for step, found in known]
            band = [(step, *found.intervals[name]) for step, found in known if name in found.intervals]
            series.append(Series(run.name, points, series_class(index), band))
        plot = line_plot(series, label=f"{marker} per 1,000 tokens", zero=True, markers=True, height=_LOW)
        cards.append(card(f"“{marker}”", plot, note="per 1,000 tokens of held-out answers"))
    return f'<div class="grid sample">{"".join(cards)}</div>' if cards else ""


def _held_out(runs: Sequence[RunData]) -> str:
    """A row for each figure that is not 0 throughout; a column before training, and two for each run."""
    every = [found for run in runs for found in (run.before, run.after) if found is not None]
    rows, zeros = [], []
    for name, title, scale in _figures(every):
        if name == "majority" and all(found.values.get("samples_per_problem") == 1 for found in every):
            continue  # of one vote
        if all(found.values.get(name) == 0 for found in every):
            zeros.append(title.removesuffix(", %"))
            continue
        inner = name.startswith("marker_rates.")
        cells = [_value(runs[0].before, name, scale)]
        for run in runs:
            cells += [_value(run.after, name, scale), _change(run, name, scale)]
        rows.append([f'<span class="inner">{esc(title)}</span>' if inner else esc(title), *cells])
    for name in ("problems", "samples"):
        counts = [fixed(run.after.values.get(name), 0) if run.after else "–" for run in runs]
        first = fixed(runs[0].before.values.get(name), 0) if runs[0].before else "–"
        rows.append([name, first, *(cell for count in counts for cell in (count, ""))])
    header = ["", "before", *(cell for run in runs for cell in (esc(run.name), "change"))]
    note = f"“before” is that of {runs[0].name}; changes are from each run’s own start; in small, intervals."
    differing = [
        run.name for run in runs if run.before and runs[0].before and run.before.values != runs[0].before.values
    ]
    note += f" {', '.join(differing)} started from other figures." if differing else ""
    note += f" 0 throughout: {', '.join(zeros)}." if zeros else ""
    return card("Held-out problems", table(header, rows), note=note)


def _figures(every: Sequence[Validation]) -> list[tuple[str, str, float]]:
    """(name, title, scale) of the figures that are there."""
    present = list(dict.fromkeys(name for found in every for name in found.values))
    figures = []
    for name, (title, scale) in FIGURES.items():
        if not name.endswith("."):
            figures += [(name, title, scale)] if name in present else []
            continue
        inner = [other.removeprefix(name) for other in present if other.startswith(name)]
        ordered = sorted(inner, key=int) if all(key.isdigit() for key in inner) else inner
        figures += [(name + key, title.format(key), scale) for key in ordered]
    return figures


def _value(found: Validation | None, name: str, scale: float) -> str:
    figure = estimate(found, name, scale)
    if figure is None:
        return "–"
    text = fixed(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f' <small class="inline">{fixed(figure.low)} … {fixed(figure.high)}</small>'
    return text


def _change(run: RunData, name: str, scale: float) -> str:
    moved = change(run, name, scale)
    if moved is None:
        return "–"
    if moved.low is None or moved.high is None:
        return signed(moved.value)
    css = "" if moved.low <= 0 <= moved.high else " moved"
    between = f'<small class="inline">{signed(moved.low)} … {signed(moved.high)}</small>'
    return f'<span class="change{css}">{signed(moved.value)}</span> {between}'


def _commanded(runs: Sequence[RunData]) -> str:
    """Evaluations made by `popsd evaluate` into the directories of the runs."""
    rows = []
    for run in runs:
        for entry in run.evaluations:
            found = Validation(*flat_figures(entry))
            title = " · ".join(str(entry[key]) for key in ("model", "set") if key in entry) or run.name
            cells = [_value(found, name, FIGURES[name][1]) for name in _COMMANDED]
            rows.append([esc(title), *cells, fixed(found.values.get("samples"), 0)])
    if not rows:
        return ""
    header = ["", *(esc(FIGURES[name][0]) for name in _COMMANDED), "samples"]
    return card("Further evaluations", table(header, rows), css="sample")


_COMMANDED = ("accuracy", "majority", "markers_per_1000_tokens", "mean_tokens", "cut_share")
