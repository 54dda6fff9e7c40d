"""The page of a diagnosis: aggregates, and selected rollouts token by token."""

from __future__ import annotations

import math
from pathlib import Path

from nemo_popsd.diagnosis.schema import RolloutRecord
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS, Statistic
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.report.decomposition import (
    entropy_plots,
    marker_push_table,
    markers_table,
    position_plots,
    push_cards,
)
from nemo_popsd.report.markup import card, data_block, esc, fixed, signed
from nemo_popsd.report.rollouts import is_truncated
from nemo_popsd.report.run import Diagnosed, read_diagnosis
from nemo_popsd.report.shell import document, refuse_another_file

FULL_COLOUR = 3.0
"""|Δ| in nats at which the colour of a token is saturated."""
_SWITCH = (("show-both", "both"), ("show-it", "Δ_it"), ("show-ref", "Δ_ref"))
_STATISTICS: tuple[Statistic, ...] = (*TOKEN_STATISTICS, *SIGNAL_STATISTICS)
_INSPECTED = (
    "delta_total",
    "delta_reference",
    "delta_question",
    "delta_target",
    *(statistic.name for statistic in _STATISTICS),
)


def write_diagnosis_page(directory: Path) -> Path:
    """Writes `index.html` into the directory of a diagnosis, and returns its path.

    Raises:
        UserError: `directory` does not contain a diagnosis.
    """
    diagnosed = read_diagnosis(directory)
    if diagnosed is None:
        raise UserError(
            "report",
            got=f"{str(directory)!r} without summary.json and rollouts.jsonl",
            need="the directory of a diagnosis",
            fix="correct the path",
        )
    page = directory / "index.html"
    refuse_another_file(page)
    write_text(page, _page(diagnosed))
    return page


def _page(diagnosed: Diagnosed) -> str:
    summary = diagnosed.summary
    shown = [rollout for rollout in diagnosed.rollouts if rollout["alternatives"]]
    every = summary["groups"]["all"]
    facts = [
        ("rollouts", f"{summary['rollouts']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("step", f"{summary['step']:,}"),
        ("target", str(summary["settings"]["target"]["family"])),
        ("‖Δ_ref‖/‖Δ_total‖", fixed((every["norm_ratio"] or {}).get("mean"), 2)),
        ("cos(Δ_total, Δ_it)", signed((every["cosine_question"] or {}).get("mean"), 2)),
        ("cos(Δ_total, Δ_ref)", signed((every["cosine_reference"] or {}).get("mean"), 2)),
    ]
    header = '<ul class="facts">' + "".join(f"<li>{esc(k)} <b>{esc(v)}</b></li>" for k, v in facts) + "</ul>"
    summaries = [(str(summary["name"]), "s1", summary)]
    body = [
        '<h2 id="tokens">Token by token</h2>',
        '<p class="lead">The colour of a token shows the two components of the teacher’s signal: Δ_it (the effect of '
        "the question, given the reference) and Δ_ref (the effect of the reference alone). Green favours the token, "
        "red disfavours it. Epistemic markers are bold. Point at a token, tap it, or use the arrow keys to see its "
        "values.</p>",
        _readers(shown),
        '<h2 id="push">Push of each component</h2>',
        '<p class="lead">First-order change of the student’s probabilities along each component, summed over all '
        "tokens: expected occurrences gained or lost per 1,000 response tokens.</p>",
        push_cards(summary, count=12),
        '<h2 id="markers">Markers and other tokens</h2><p class="lead">Means, with quartiles below.</p>',
        '<div class="two">'
        + card("Statistics of the generated tokens", markers_table(summary))
        + card(
            "Push on the markers",
            marker_push_table(summary),
            note="Push on markers that are a single token, per 1,000 tokens, and relative to their probability. "
            "Markers with several tokens have no value.",
        )
        + "</div>",
        '<h2 id="position">By position in the response</h2>',
        '<p class="lead">Mean, with a band between the quartiles.</p>',
        position_plots(summaries),
        '<h2 id="entropy">By entropy of the student</h2><p class="lead">Bins in nats.</p>',
        entropy_plots(summaries),
    ]
    return document(str(summary["name"]), "Purified OPSD · diagnosis", header, "".join(body))


def _readers(shown: list[RolloutRecord]) -> str:
    if not shown:
        return '<p class="absent">No rollout is stored token by token (diagnosis.shown).</p>'
    buttons = "".join(
        f'<button type="button" value="{value}" aria-pressed="{"true" if index == 0 else "false"}">{esc(name)}</button>'
        for index, (value, name) in enumerate(_SWITCH)
    )
    legend = (
        f'<span class="scale">−{FULL_COLOUR:g} nats <i></i> +{FULL_COLOUR:g}</span>'
        '<p class="note">both: background Δ_it, underline Δ_ref</p>'
    )
    readers = "".join(_reader(rollout, f"rollout-{index}") for index, rollout in enumerate(shown))
    return f'<div class="switch" role="group">{buttons}</div>{legend}<div class="readers show-both">{readers}</div>'


def _reader(rollout: RolloutRecord, name: str) -> str:
    values = rollout["values"]
    spans = []
    for piece, marked, question, reference in zip(
        rollout["pieces"], rollout["marked"], values["delta_question"], values["delta_reference"], strict=True
    ):
        css = [_side("q", question), _side("r", reference), "marked" if marked else ""]
        style = f"--q:{_strength(question)};--r:{_strength(reference)}"
        spans.append(f'<span class="{" ".join(filter(None, css))}" style="{style}">{esc(piece)}</span>')
    strongest = max(
        range(len(spans)),
        key=lambda index: abs(values["delta_question"][index] or 0) + abs(values["delta_reference"][index] or 0),
        default=0,
    )
    data = {
        "first": strongest,
        "pieces": rollout["pieces"],
        "values": {key: values[key] for key in _INSPECTED if key in values},
        "statistics": [[statistic.name, statistic.symbol] for statistic in _STATISTICS if statistic.name in values],
        "alternatives": rollout["alternatives"],
    }
    truncated = '<span class="badge">truncated at the limit</span>' if is_truncated(rollout) else ""
    text = (
        f'<section class="card"><h3>Row {esc(rollout["row"])}{truncated}</h3>'
        f'<p class="question">{esc(rollout["question"])}</p>'
        "<details><summary>reference, as both teachers see it</summary>"
        f"<pre>{esc(rollout['reference'])}</pre></details>"
        f'<div class="tokens" tabindex="0" data-rollout="{name}">{"".join(spans)}</div></section>'
    )
    return f'<div class="reader sample">{text}<aside class="card inspector"></aside></div>{data_block(data, name)}'


def _side(axis: str, value: float | None) -> str:
    if not value:
        return ""
    return axis + ("u" if value > 0 else "d")


def _strength(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "0"
    return f"{0.85 * min(abs(value) / FULL_COLOUR, 1.0):.2f}"
