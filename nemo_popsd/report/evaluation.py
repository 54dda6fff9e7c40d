"""Tables and curves of results on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_popsd.report.groups import grouped
from nemo_popsd.report.markup import card, esc, fixed, signed, table
from nemo_popsd.report.plots import Series, line_plot
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
    "closed_thinking_share": ("closed thinking, %", 100.0),
    "repeated_share": ("repeated word sequences, %", 100.0),
    "looping_share": ("ends in a loop, %", 100.0),
    "cut_share": ("truncated at the limit, %", 100.0),
    "unanswered_share": ("without an answer, %", 100.0),
    "undecided_share": ("comparison undecided, %", 100.0),
}
"""Title and scale of each statistic of a summary, in order. A name with a trailing dot applies to all names with this
prefix.
"""

_LOW = 112.0


def evaluation(runs: Sequence[RunData]) -> str:
    """Results on held-out problems before and after training, then the evaluations of `popsd evaluate`."""
    held_out = _held_out(runs) if any(run.validations for run in runs) else ""
    return held_out + _marker_curves(runs) + _further(runs)


def _marker_curves(runs: Sequence[RunData]) -> str:
    """The rate of each marker by step, with intervals; markers that never occur are omitted."""
    validations = [validation for run in runs for validation in run.validations.values()]
    cards = []
    for name, marker, _ in _statistics(validations):
        if not name.startswith("marker_rates.") or not any(one.values.get(name) for one in validations):
            continue
        series = result_series(runs, name)
        plot = line_plot(series, label=f"{marker} per 1,000 tokens", zero=True, markers=True, height=_LOW)
        cards.append(card(f"“{marker}”", plot, note="per 1,000 tokens of held-out answers"))
    return f'<div class="grid sample">{"".join(cards)}</div>' if cards else ""


def result_series(runs: Sequence[RunData], name: str) -> list[Series]:
    """Curves of a result of the evaluations during training; a single run has its stored intervals."""

    def curve(run: RunData) -> list[tuple[float, float]]:
        return [(float(step), one.values[name]) for step, one in run.validations.items() if name in one.values]

    series = []
    for group in grouped(runs):
        one_of_all = group.runs[0].validations.items()
        band = [(float(step), *one.intervals[name]) for step, one in one_of_all if name in one.intervals]
        series.append(group.series(curve, band))
    return series


def _held_out(runs: Sequence[RunData]) -> str:
    """A line per statistic that is not always 0, with one column before training and two columns per run."""
    validations = [one for run in runs for one in (run.before, run.after) if one is not None]
    rows, zeros = [], []
    for name, title, scale in _statistics(validations):
        if name == "majority" and all(one.values.get("samples_per_problem") == 1 for one in validations):
            continue  # a majority of one sample equals the accuracy
        if all(one.values.get(name) == 0 for one in validations):
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
    note = f"“before” shows {runs[0].name}; changes are relative to each run’s own start; small numbers are intervals."
    differing = [
        run.name for run in runs if run.before and runs[0].before and run.before.values != runs[0].before.values
    ]
    note += f" {', '.join(differing)} started from different values." if differing else ""
    note += f" Always 0: {', '.join(zeros)}." if zeros else ""
    return card("Held-out problems", table(header, rows), note=note)


def _statistics(validations: Sequence[Validation]) -> list[tuple[str, str, float]]:
    """(name, title, scale) of the statistics that `validations` have."""
    present = list(dict.fromkeys(name for validation in validations for name in validation.values))
    statistics = []
    for name, (title, scale) in FIGURES.items():
        if not name.endswith("."):
            statistics += [(name, title, scale)] if name in present else []
            continue
        inner = [other.removeprefix(name) for other in present if other.startswith(name)]
        ordered = sorted(inner, key=int) if all(key.isdigit() for key in inner) else inner
        statistics += [(name + key, title.format(key), scale) for key in ordered]
    return statistics


def _value(validation: Validation | None, name: str, scale: float) -> str:
    interval = estimate(validation, name, scale)
    if interval is None:
        return "–"
    text = fixed(interval.value)
    if interval.low is not None and interval.high is not None:
        text += f' <small class="inline">{fixed(interval.low)} … {fixed(interval.high)}</small>'
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


def _further(runs: Sequence[RunData]) -> str:
    """The evaluations that `popsd evaluate` wrote into the directories of the runs."""
    rows = []
    for run in runs:
        for entry in run.evaluations:
            validation = Validation(*flat_figures(entry))
            title = " · ".join(str(entry[key]) for key in ("model", "set") if key in entry) or run.name
            cells = [_value(validation, name, FIGURES[name][1]) for name in _FURTHER]
            rows.append([esc(title), *cells, fixed(validation.values.get("samples"), 0)])
    if not rows:
        return ""
    header = ["", *(esc(FIGURES[name][0]) for name in _FURTHER), "samples"]
    return card("Further evaluations", table(header, rows), css="sample")


_FURTHER = ("accuracy", "majority", "markers_per_1000_tokens", "mean_tokens", "cut_share")
