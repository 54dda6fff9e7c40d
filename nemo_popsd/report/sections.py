"""The sections of the report. Each function receives the runs to compare, in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS
from nemo_popsd.observability.metrics import MismatchMetrics
from nemo_popsd.report import decomposition, verdicts
from nemo_popsd.report.bars import Estimate, interval_chart, push_chart, share_bar
from nemo_popsd.report.evaluation import result_series
from nemo_popsd.report.groups import colours_of, grouped
from nemo_popsd.report.markup import card, esc, fixed, number, table
from nemo_popsd.report.plots import Event, Series, legend, line_plot
from nemo_popsd.report.rollouts import answer_pairs, flipped, pair_cards
from nemo_popsd.report.run import AFTER, BEFORE, COST, GUARD, RunData, flat_settings

Runs = Sequence[RunData]

CURVES = {
    "loss": ("Loss", "training objective"),
    **{statistic.name: (statistic.symbol, statistic.unit) for statistic in TOKEN_STATISTICS},
    "response_tokens": ("Length of a rollout", "tokens"),
    "marker_rate": ("Epistemic markers", "per 1,000 rollout tokens"),
    "cut_share": ("Rollouts truncated at the limit", "share"),
    "repetition": ("Repeated text", "share of the rollout tokens"),
    "rollout_age": ("Mean age of rollout tokens", "steps"),
    "rollout_age_max": ("Age of the oldest rollout token", "steps"),
    "mismatch_kl": ("Engine versus trainer", "KL of the sampled tokens, nats per token"),
    "weighted_share": ("Tokens that count in the loss", "share of the response tokens"),
    "frozen_tokens": ("Tokens of the frozen branches", "per step"),
    "frozen_tokens_saved": ("Tokens saved by shared prefixes", "per step"),
    "frozen_saved_share": ("Tokens saved by shared prefixes", "share"),
    "padding_share": ("Padding", "share of the tokens in the forward passes"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
}
"""Title and unit of the training curves, in order. Other metrics follow under their own names."""
DECOMPOSITION_CURVES = {statistic.name: (statistic.symbol, statistic.meaning) for statistic in SIGNAL_STATISTICS}
PHASES = {
    "seconds_rollout": ("rollout", "s1"),
    "seconds_frozen": ("frozen branches", "s3"),
    "seconds_train": ("training", "s2"),
}
_MISMATCH = {f"mismatch_{item.name}" for item in fields(MismatchMetrics)}
_PLACED = {*CURVES, *DECOMPOSITION_CURVES, *PHASES, *_MISMATCH, "tokens_per_second"}
COSTS = {
    "tokens_per_gpu": ("Response tokens per second and GPU", ""),
    "tflops": ("Frozen branches and training", "TFLOP/s per GPU"),
    "mfu": ("Share of the peak FLOP/s", ""),
    "memory_rollout": ("Peak memory, rollout", "GiB"),
    "memory_frozen": ("Peak memory, frozen branches", "GiB"),
    "memory_train": ("Peak memory, training", "GiB"),
    "seconds_weights": ("Transfer of weights to vLLM", "s"),
    "seconds_waiting": ("Longest wait for other replicas", "s"),
    "seconds_predicted": ("Step as estimated by popsd plan", "s"),
    "predicted_ratio": ("Measured divided by estimated seconds", ""),
}
"""Title and unit of the metrics of a step's cost, in order."""
_SAMPLES = 4
_LOW = 112.0
"""Height of the plots in the section "At a glance"."""


def colours(runs: Runs) -> str:
    """The legend of the runs' colours."""
    return legend([("before training", "base"), *((group.label, group.css) for group in grouped(runs))])


def glance(runs: Runs) -> str:
    """The answers to the three questions, and the settings that would provide missing answers."""
    cards, missing = [], []
    if any(run.validations for run in runs):
        cards += [_accuracy_card(runs), _thinking_card(runs)]
    else:
        missing.append("Accuracy and thinking were not measured: set data.validation.path.")
    if any(run.diagnoses for run in runs):
        cards.append(_target_card(runs))
    else:
        missing.append("The target was not diagnosed: set diagnosis.in_training=true.")
    note = f'<p class="absent">{esc(" ".join(missing))}</p>' if missing else ""
    columns = {2: "two", 3: "three"}.get(len(cards), "")
    return f'{note}<div class="{columns} glance">{"".join(cards)}</div>' if cards else note


def _verdict(css: str, name: str, text: str) -> str:
    return f'<p class="verdict"><i class="{css}"></i><span><b>{esc(name)}</b> {esc(text)}</span></p>'


def _accuracy_card(runs: Runs) -> str:
    answers = "".join(
        _verdict(css, run.name, verdicts.accuracy_verdict(run)) + _before_after(run, "accuracy", 100, " %")
        for css, run in zip(colours_of(runs), runs, strict=True)
    )
    rows = []
    estimates = [("before training", "base", runs[0].before)]
    estimates += [(run.name, css, run.after) for css, run in zip(colours_of(runs), runs, strict=True)]
    for label, css, validation in estimates:
        interval = verdicts.accuracy(validation)
        if interval is not None:
            rows.append(Estimate(label, interval.value, interval.low, interval.high, css))
    chart = interval_chart(rows, label="accuracy with 95 % intervals", text=lambda value: f"{fixed(value)} %")
    series = []
    for group in grouped(runs):
        by_step = [(float(step), verdicts.accuracy(one)) for step, one in group.runs[0].validations.items()]
        known = [(step, one) for step, one in by_step if one]
        band = [(step, one.low, one.high) for step, one in known if one.low is not None and one.high is not None]
        series.append(group.series(_accuracy_curve, band))
    plot = line_plot(
        series,
        label="accuracy by step",
        format_y=lambda value: f"{fixed(value)} %",
        unit=" %",
        markers=True,
        height=_LOW,
    )
    body = f'{answers}<div class="split"></div>{chart}<p class="sub">by step</p>{plot}'
    return card("Did the accuracy change?", body, note="held-out problems; 95 % intervals")


def _accuracy_curve(run: RunData) -> list[tuple[float, float]]:
    by_step = [(float(step), verdicts.accuracy(validation)) for step, validation in run.validations.items()]
    return [(step, interval.value) for step, interval in by_step if interval is not None]


def _before_after(run: RunData, key: str, scale: float, unit: str, what: str = "", *, decimals: int = 1) -> str:
    """A validation result before and after training, in a large font."""
    ends = [verdicts.estimate(validation, key, scale) for validation in (run.before, run.after)]
    if None in ends:
        return ""
    before, after = (fixed(end.value, decimals) for end in ends if end)
    suffix = f" {what}" if what else ""
    return f'<p class="figure"><small>{before}{unit} →</small> {after}{unit}<small>{esc(suffix)}</small></p>'


def _thinking_card(runs: Runs) -> str:
    answers = "".join(
        _verdict(css, run.name, verdicts.thinking_verdict(run))
        + _before_after(run, "markers_per_1000_tokens", 1, "", "markers per 1,000 tokens")
        + _before_after(run, "mean_tokens", 1, "", "tokens per answer", decimals=0)
        for css, run in zip(colours_of(runs), runs, strict=True)
    )
    charts = ""
    for key, title in (("markers_per_1000_tokens", "markers per 1,000 tokens"), ("mean_tokens", "tokens per answer")):
        series = result_series(runs, key)
        charts += f'<p class="sub">{title}</p>' + line_plot(series, label=title, zero=True, markers=True, height=_LOW)
    note = f"held-out answers; changes of both within ±{100 * verdicts.KEPT:.0f} % count as kept"
    return card("Did the model keep thinking?", f'{answers}<div class="split"></div>{charts}', note=note)


def _target_card(runs: Runs) -> str:
    parts = []
    for css, run in zip(colours_of(runs), runs, strict=True):
        summary = verdicts.target_summary(run)
        if summary is None:
            parts.append(_verdict(css, run.name, "not diagnosed"))
            continue
        parts.append(_verdict(css, run.name, verdicts.target_verdict(summary)))
        parts.append(f'<div class="split"></div>{decomposition.chips(summary, "target")}')
        shares = {name: verdicts.marker_share(summary, name) for name in decomposition.COMPONENTS}
        if None not in shares.values():
            bars = [(decomposition.SHORT[name], 100 * share) for name, share in shares.items() if share is not None]
            parts.append('<p class="sub">change of the markers’ probability along each component, per cent</p>')
            parts.append(push_chart(bars, label="push on markers by component", tokens=False))
    note = "first-order effect of the target and of each component of the teacher’s signal at the start of training"
    return card("What did the target push?", "".join(parts), note=note)


def curves(runs: Runs) -> str:
    """Training metrics by step."""
    names = [name for name in CURVES if any(name in run.training for run in runs)]
    names += sorted({name for run in runs for name in run.training if not name.startswith((GUARD, COST))} - _PLACED)
    cards, alarms, constant = [], [], []
    colours = colours_of(runs)
    for name in names:
        title, note = CURVES.get(name, (name, ""))
        events = [
            Event(float(step), f"{run.name}, step {step:,}: {text}", css)
            for css, run in zip(colours, runs, strict=True)
            for step, text in run.alarms(name)
        ]
        alarms += [f"<li>{esc(title)}: {esc(event.text)}</li>" for event in events]
        value = _constant(runs, name)
        if value is not None and not events:
            constant.append((title, value))
        else:
            cards.append(card(title, line_plot(_series(runs, name), label=title, events=events), note=note))
    listed = f'<ul class="lead">{"".join(alarms)}</ul>' if alarms else ""
    grid = f'<div class="grid">{"".join(cards)}</div>' if cards else ""
    return listed + grid + _folded(constant) or '<p class="absent">No step was trained.</p>'


def _constant(runs: Runs, name: str) -> float | None:
    """The value of a metric that is constant over several steps and all runs; None for other metrics."""
    values = {value for run in runs for _, value in run.training.get(name, [])}
    steps = max(len(run.training.get(name, [])) for run in runs)
    return values.pop() if len(values) == 1 and steps > 1 else None


def _folded(constant: Sequence[tuple[str, float]]) -> str:
    """Constant metrics, as a collapsed list."""
    if not constant:
        return ""
    rows = [[esc(title), number(value)] for title, value in constant]
    count = f"{len(rows)} metric{'s' if len(rows) > 1 else ''} that did not change"
    return f"<details><summary>{count}</summary>{card('Constant', table(['', 'value'], rows))}</details>"


def _series(runs: Runs, name: str) -> list[Series]:
    return [group.series(lambda run: run.training.get(name, [])) for group in grouped(runs)]


def decomposed(runs: Runs, page: Path) -> str:
    """The paper's decomposition: by training step, by position, by entropy, and the push of each component."""
    named = [
        (name, *texts) for name, texts in DECOMPOSITION_CURVES.items() if any(name in run.training for run in runs)
    ]
    values = {name: _constant(runs, name) for name, _, _ in named}
    cards = [
        card(title, line_plot(_series(runs, name), label=title), note=note)
        for name, title, note in named
        if values[name] is None
    ]
    folded = _folded([(title, value) for name, title, _ in named if (value := values[name]) is not None])
    body = (f'<div class="grid">{"".join(cards)}</div>' if cards else "") + folded
    ends = [
        (f"{run.name}, after", css, run.diagnoses[AFTER].summary)
        for css, run in zip(colours_of(runs), runs, strict=True)
        if AFTER in run.diagnoses
    ]
    starts = [("before training", "base", run.diagnoses[BEFORE].summary) for run in runs if BEFORE in run.diagnoses][:1]
    both = [*starts, *ends]
    if not both:
        return body or '<p class="absent">There are neither metrics nor diagnoses of the decomposition.</p>'
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
            f'<h2 class="minor">Push of each component in {esc(run.name)}</h2><p class="lead">First-order change of '
            f"the student’s probabilities along each component at step {summary['step']:,}, in expected occurrences "
            f"per 1,000 response tokens. Token by token: {links}.</p>"
            + decomposition.push_cards(summary, count=8)
            + card(
                "Markers",
                decomposition.marker_push_table(summary),
                note="push per 1,000 tokens on markers that are a single token, and relative to their probability",
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
            parts.append(f'{heading}<p class="absent">The run has no stored answers.</p>')
            continue
        markers = run.setting("evaluation.markers") or ()
        shown = "".join(pair_cards(pair, [str(marker) for marker in markers]) for pair in pairs)
        parts.append(f'{heading}<p class="lead">{esc(origin[0].upper() + origin[1:])}.</p>{shown}')
        parts.append(flipped(run, [str(marker) for marker in markers]))
    return "".join(parts)


def throughput(runs: Runs) -> str:
    """The time of a step by phase, and tokens per second."""
    cards = []
    for run in runs:
        seconds = [(label, run.mean(name) or 0.0, css) for name, (label, css) in PHASES.items()]
        total = sum(amount for _, amount, _ in seconds)
        if not total:
            continue
        figure = (
            f'<p class="figure">{number(total)} <small>s per step</small> &nbsp; '
            f"{number(run.mean('tokens_per_second'))} <small>response tokens per second</small></p>"
        )
        bar = share_bar(seconds, label=f"share of each phase in a step of {run.name}")
        cards.append(card(run.name, figure + bar + _cost_table(run)))
    if not cards:
        return '<p class="absent">No step was timed.</p>'
    by_step = _series(runs, "tokens_per_second")
    cards.append(card("Response tokens per second", line_plot(by_step, label="tokens per second by step", zero=True)))
    return f'<div class="grid">{"".join(cards)}</div>'


def _cost_table(run: RunData) -> str:
    """Means of the cost metrics, and the names of metrics that were not measured."""
    rows = [
        [esc(title), f"{number(value)} {unit}".strip()]
        for name, (title, unit) in COSTS.items()
        if (value := run.mean(COST + name)) is not None
    ]
    if not rows:
        return ""
    missing = [title for name, (title, _) in COSTS.items() if run.mean(COST + name) is None]
    note = f'<p class="sub">Not measured here: {esc(", ".join(missing).lower())}.</p>' if missing else ""
    return table(["mean of the steps", ""], rows) + note


def provenance(runs: Runs) -> str:
    """Versions, layout, settings that differ between the runs, and the complete configuration of each."""
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
        flat = [flat_settings(run.config) for run in runs]
        keys = sorted({key for settings in flat for key in settings})
        differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
        rows = [[f"<code>{esc(key)}</code>", *(esc(settings.get(key, "–")) for settings in flat)] for key in differing]
        parts.append(card("Settings that differ", table(header, rows)))
    body = f'<div class="two">{"".join(parts)}</div>' if len(parts) > 1 else "".join(parts)
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        body += f"<details><summary>configuration of {esc(run.name)}</summary><pre>{esc(text)}</pre></details>"
    return body
