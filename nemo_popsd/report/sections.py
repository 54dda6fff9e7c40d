"""The sections of the report. Each takes the runs that are compared, first to last, in their colours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_popsd.report import decomposition, verdicts
from nemo_popsd.report.bars import Estimate, interval_chart, share_bar
from nemo_popsd.report.markup import card, esc, fixed, number, signed, table
from nemo_popsd.report.plots import Series, legend, line_plot, series_class
from nemo_popsd.report.rollouts import answer_pairs, pair_cards
from nemo_popsd.report.run import AFTER, BEFORE, RunData

Runs = Sequence[RunData]

CURVES = {
    "loss": ("Loss", "what is minimised"),
    "forward_kl": ("KL(target ‖ student)", "nats per token"),
    "reverse_kl": ("KL(student ‖ target)", "nats per token"),
    "student_entropy": ("Entropy of the student", "nats per token"),
    "target_entropy": ("Entropy of the target", "nats per token"),
    "response_tokens": ("Length of a rollout", "tokens"),
    "marker_rate": ("Epistemic markers", "per 1,000 rollout tokens"),
    "cut_share": ("Rollouts cut at the limit", "share"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
}
"""Training curves in order: title and unit. Metrics without an entry follow under their own names."""
DECOMPOSITION_CURVES = {
    "delta_ratio": ("‖Δ_ref‖ / ‖Δ_total‖", "above 1: the reference-induced part dominates"),
    "cos_total_it": ("cos(Δ_total, Δ_it)", "of the question-conditioned part"),
    "cos_total_ref": ("cos(Δ_total, Δ_ref)", "of the reference-induced part"),
}
PHASES = {
    "seconds_rollout": ("rollout", "s1"),
    "seconds_frozen": ("frozen branches", "s3"),
    "seconds_train": ("training", "s2"),
}
_PLACED = {*CURVES, *DECOMPOSITION_CURVES, *PHASES, "tokens_per_second"}
_SAMPLES = 4


def colours(runs: Runs) -> str:
    """Which colour is which run."""
    return legend([("before training", "base"), *((run.name, series_class(i)) for i, run in enumerate(runs))])


def glance(runs: Runs) -> str:
    """The three questions, answered."""
    return f'<div class="three glance">{_accuracy_card(runs)}{_thinking_card(runs)}{_target_card(runs)}</div>'


def _verdict(index: int, name: str, text: str) -> str:
    return f'<p class="verdict"><i class="{series_class(index)}"></i><span><b>{esc(name)}</b> {esc(text)}</span></p>'


def _accuracy_card(runs: Runs) -> str:
    rows = []
    estimates = [("before training", "base", runs[0].before)]
    estimates += [(run.name, series_class(index), run.after) for index, run in enumerate(runs)]
    for label, css, values in estimates:
        found = verdicts.accuracy(values)
        if found is not None:
            rows.append(Estimate(label, found.value, found.low, found.high, css))
    chart = interval_chart(rows, label="accuracy with 95 % intervals", text=lambda value: f"{fixed(value)} %")
    told = "".join(_verdict(index, run.name, verdicts.accuracy_verdict(run)) for index, run in enumerate(runs))
    return card("Did accuracy move?", f"{told}{chart}", note="held-out problems; 95 % intervals")


def _thinking_card(runs: Runs) -> str:
    told = "".join(_verdict(index, run.name, verdicts.thinking_verdict(run)) for index, run in enumerate(runs))
    charts = ""
    for key, title in (("markers_per_1000_tokens", "markers per 1,000 tokens"), ("mean_tokens", "tokens per answer")):
        series = [
            Series(
                run.name,
                [(float(step), values[key]) for step, values in run.validations.items() if key in values],
                series_class(index),
            )
            for index, run in enumerate(runs)
        ]
        charts += f'<p class="sub">{title}</p>' + line_plot(series, label=title, zero=True, markers=True)
    note = f"held-out answers; up to ±{100 * verdicts.KEPT:.0f} % in both counts as kept"
    return card("Did it keep thinking?", told + charts, note=note)


def _target_card(runs: Runs) -> str:
    parts = []
    for index, run in enumerate(runs):
        summary = verdicts.target_summary(run)
        if summary is None:
            parts.append(_verdict(index, run.name, "not diagnosed"))
            continue
        parts.append(_verdict(index, run.name, verdicts.target_verdict(summary)))
        parts.append(decomposition.chips(summary, "target"))
    note = "the vocabulary entries that the target raises and lowers most at the start of training"
    return card("What did the target push?", "".join(parts), note=note)


def evaluation(runs: Runs) -> str:
    """Held-out figures before and after, and by step."""
    first = runs[0].before
    columns: list[tuple[str, Mapping[str, float] | None]] = [("before", first)]
    columns += [(run.name, run.after) for run in runs]
    if all(values is None for _, values in columns):
        return '<p class="absent">No validation was run (data.validation.path).</p>'
    measures = [
        ("accuracy, %", lambda v: _accuracy_cell(v), "accuracy", 100.0),
        ("markers per 1,000 tokens", lambda v: fixed(v.get("markers_per_1000_tokens")), "markers_per_1000_tokens", 1.0),
        ("tokens per answer", lambda v: fixed(v.get("mean_tokens")), "mean_tokens", 1.0),
        ("cut at the limit, %", lambda v: _percent(v, "cut_share"), "cut_share", 100.0),
        ("without an answer, %", lambda v: _percent(v, "unanswered_share"), "unanswered_share", 100.0),
        ("problems", lambda v: number(v.get("problems"), 6), "", 0.0),
        ("samples", lambda v: number(v.get("samples"), 6), "", 0.0),
    ]
    rows = []
    for title, cell, key, scale in measures:
        cells = []
        for column, (_, values) in enumerate(columns):
            text = cell(values) if values else "–"
            start = runs[column - 1].before if column else None
            if column and values and start and key in values and key in start:
                text += f"<small>{signed(scale * (values[key] - start[key]))}</small>"
            cells.append(text)
        rows.append([esc(title), *cells])
    header = ["", *(esc(name) for name, _ in columns)]
    differing = [run.name for run in runs if run.before != first]
    note = f"“before” is that of {runs[0].name}; changes are from each run’s own start."
    if differing:
        note += f" {', '.join(differing)} started from other figures."
    return card("Held-out problems", table(header, rows), note=note) + _validation_curves(runs) + _commanded(runs)


def _accuracy_cell(values: Mapping[str, float]) -> str:
    found = verdicts.accuracy(dict(values))
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return fixed(found.value)
    return f"{fixed(found.value)} <small>{fixed(found.low)} … {fixed(found.high)}</small>"


def _percent(values: Mapping[str, float], key: str) -> str:
    return fixed(100 * values[key]) if key in values else "–"


def _validation_curves(runs: Runs) -> str:
    if all(len(run.validations) < 2 for run in runs):
        return ""
    series = []
    for index, run in enumerate(runs):
        found = [(float(step), verdicts.accuracy(values)) for step, values in run.validations.items()]
        series.append(
            Series(
                run.name,
                [(step, a.value) for step, a in found if a],
                series_class(index),
                [(step, a.low, a.high) for step, a in found if a and a.low is not None and a.high is not None],
            )
        )
    plot = line_plot(series, label="accuracy by step", format_y=lambda v: fixed(v, 0), markers=True)
    cards = [card("Accuracy", plot, note="per cent, with 95 % intervals")]
    for key, title, note in (
        ("markers_per_1000_tokens", "Markers in answers", "per 1,000 tokens"),
        ("mean_tokens", "Length of answers", "tokens"),
    ):
        lines = [
            Series(
                run.name, [(float(s), v[key]) for s, v in run.validations.items() if key in v], series_class(index)
            )
            for index, run in enumerate(runs)
        ]
        cards.append(card(title, line_plot(lines, label=title, markers=True), note=note))
    return f'<div class="grid" style="margin-top:14px">{"".join(cards)}</div>'


def _commanded(runs: Runs) -> str:
    """Evaluations made by `popsd evaluate` into the directories of the runs."""
    found = [(run, entry) for run in runs for entry in run.evaluations if "accuracy" in entry]
    if not found:
        return ""
    rows = [
        [
            esc(entry.get("model", "?")),
            _accuracy_cell(entry),
            fixed(entry.get("markers_per_1000_tokens")),
            fixed(entry.get("mean_tokens")),
            number(entry.get("samples"), 6),
        ]
        for _, entry in found
    ]
    header = ["", "accuracy, %", "markers per 1,000 tokens", "tokens per answer", "samples"]
    return card("Further evaluations", table(header, rows), css="sample")


def curves(runs: Runs) -> str:
    """Training metrics by step."""
    names = [name for name in CURVES if any(name in run.training for run in runs)]
    names += sorted({name for run in runs for name in run.training} - _PLACED)
    cards = []
    for name in names:
        title, note = CURVES.get(name, (name, ""))
        cards.append(card(title, line_plot(_series(runs, name), label=title), note=note))
    return f'<div class="grid">{"".join(cards)}</div>' if cards else '<p class="absent">No step was trained.</p>'


def _series(runs: Runs, name: str) -> list[Series]:
    return [Series(run.name, run.training.get(name, []), series_class(index)) for index, run in enumerate(runs)]


def decomposed(runs: Runs, page: Path) -> str:
    """The paper's decomposition: through training, by position and entropy, and what is pushed."""
    cards = [
        card(title, line_plot(_series(runs, name), label=title), note=note)
        for name, (title, note) in DECOMPOSITION_CURVES.items()
        if any(name in run.training for run in runs)
    ]
    body = f'<div class="grid">{"".join(cards)}</div>' if cards else ""
    ends = [
        (f"{run.name}, after", series_class(index), run.diagnoses[AFTER].summary)
        for index, run in enumerate(runs)
        if AFTER in run.diagnoses
    ]
    starts = [("before training", "base", run.diagnoses[BEFORE].summary) for run in runs if BEFORE in run.diagnoses][:1]
    both = [*starts, *ends]
    if not both:
        return body or '<p class="absent">Neither metrics nor diagnoses of the decomposition are on disk.</p>'
    labels = legend([(label, css) for label, css, _ in both])
    body += f'<h2 class="minor">By position in the response</h2>{labels}{decomposition.position_plots(both)}'
    body += f'<h2 class="minor">By entropy of the student</h2>{labels}{decomposition.entropy_plots(both)}'
    for run in runs:
        summary = verdicts.target_summary(run)
        if summary is None:
            continue
        links = ", ".join(
            f'<a href="{esc(_relative(run.directory / "diagnosis" / name / "index.html", page))}">{esc(name)}</a>'
            for name in run.diagnoses
        )
        body += (
            f'<h2 class="minor">What is pushed in {esc(run.name)}</h2><p class="lead">First-order change of the '
            f"student’s probabilities along each part at step {summary['step']:,}, in expected occurrences per 1,000 "
            f"response tokens. Token by token: {links}.</p>"
            + decomposition.push_cards(summary, count=8)
            + card(
                "Markers",
                decomposition.marker_push_table(summary),
                note="push per 1,000 tokens on entries that are one whole marker, and relative to their probability",
                css="sample",
            )
        )
    return body


def _relative(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def samples(runs: Runs) -> str:
    """Answers before and after, side by side."""
    parts = []
    for run in runs:
        pairs, origin = answer_pairs(run, _SAMPLES)
        heading = f'<h2 class="minor">{esc(run.name)}</h2>' if len(runs) > 1 else ""
        if not pairs:
            parts.append(f'{heading}<p class="absent">No answers of this run are on disk.</p>')
            continue
        markers = run.setting("evaluation.markers") or ()
        shown = "".join(pair_cards(pair, [str(marker) for marker in markers]) for pair in pairs)
        parts.append(f'{heading}<p class="lead">{esc(origin[0].upper() + origin[1:])}.</p>{shown}')
    return "".join(parts)


def throughput(runs: Runs) -> str:
    """Where the time of a step went."""
    cards = []
    for run in runs:
        seconds = [(label, run.mean(name) or 0.0, css) for name, (label, css) in PHASES.items()]
        whole = sum(amount for _, amount, _ in seconds)
        if not whole:
            continue
        told = (
            f'<p class="figure">{number(whole)} <small>s per step</small> &nbsp; '
            f"{number(run.mean('tokens_per_second'))} <small>response tokens per second</small></p>"
        )
        cards.append(card(run.name, told + share_bar(seconds, label=f"share of a step in {run.name}")))
    if not cards:
        return '<p class="absent">No step was timed.</p>'
    by_step = [
        Series(run.name, run.training.get("tokens_per_second", []), series_class(index))
        for index, run in enumerate(runs)
    ]
    cards.append(
        card("Response tokens per second", line_plot(by_step, label="tokens per second by step", zero=True))
    )
    return f'<div class="grid">{"".join(cards)}</div>'


def provenance(runs: Runs) -> str:
    """Versions, layout, and configuration: where runs differ, then all of it."""
    libraries = sorted({name for run in runs for name in run.manifest.get("versions", {})})
    rows = [
        [esc(name), *(esc(run.manifest.get("versions", {}).get(name) or "–") for run in runs)] for name in libraries
    ]
    layouts = [run.manifest.get("layout", {}) for run in runs]
    rows += [
        [f"{esc(axis)} parallel", *(esc(layout.get(axis, "–")) for layout in layouts)]
        for axis in sorted({axis for layout in layouts for axis in layout})
    ]
    header = ["", *(esc(run.name) for run in runs)]
    parts = []
    if rows:
        parts.append(card("Versions and layout", table(header, rows), note="of the final checkpoint"))
    if len(runs) > 1:
        flat = [_flat(run.config) for run in runs]
        keys = sorted({key for settings in flat for key in settings})
        differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
        rows = [[f"<code>{esc(key)}</code>", *(esc(settings.get(key, "–")) for settings in flat)] for key in differing]
        parts.append(card("Settings that differ", table(header, rows)))
    body = f'<div class="two">{"".join(parts)}</div>' if len(parts) > 1 else "".join(parts)
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        body += f"<details><summary>configuration of {esc(run.name)}</summary><pre>{esc(text)}</pre></details>"
    return body


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
