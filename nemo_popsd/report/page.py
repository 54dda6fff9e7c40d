"""The report on one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.files.atomic import write_text
from nemo_popsd.report import arms, sections, views
from nemo_popsd.report.evaluation import evaluation
from nemo_popsd.report.groups import grouped, told_apart
from nemo_popsd.report.markup import esc, number
from nemo_popsd.report.run import RunData, read_run
from nemo_popsd.report.shell import document, refuse_another_file

NAME = "report.html"
"""File name of the report in the directory of a run."""

_SECTIONS = (
    ("glance", "At a glance"),
    ("seeds", "Over seeds"),
    ("evaluation", "Evaluation"),
    ("training", "Training"),
    ("views", "Views, scored before training"),
    ("decomposition", "Decomposition"),
    ("samples", "Answers before and after"),
    ("throughput", "Throughput"),
    ("provenance", "Versions and settings"),
)

_MOST_SHOWN = 3
"""Maximum number of runs whose names and main settings are shown at the top of the page."""


def write_report(directories: Sequence[Path], page: Path) -> Path:
    """Writes one page that compares the runs in `directories` in this order, and returns its path.

    Raises:
        UserError: a directory does not contain a run, or `page` exists and is not a page of nemo_popsd.
    """
    refuse_another_file(page)
    runs = told_apart([read_run(directory) for directory in directories])
    text = _page(runs, page)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    return page


def _page(runs: Sequence[RunData], page: Path) -> str:
    contents = {
        "glance": sections.glance(runs),
        "seeds": arms.section(runs),
        "evaluation": evaluation(runs),
        "training": sections.curves(runs),
        "views": views.section(runs),
        "decomposition": sections.decomposed(runs, page),
        "samples": sections.samples(runs),
        "throughput": sections.throughput(runs),
        "provenance": sections.provenance(runs),
    }
    keys = f'<div class="keys">{sections.colours(runs)}</div>'
    shown = [(name, title) for name, title in _SECTIONS if contents[name]]
    body = keys + "".join(f'<h2 id="{name}">{esc(title)}</h2>{contents[name]}' for name, title in shown)
    links = "".join(f'<a href="#{name}">{esc(title)}</a>' for name, title in shown)
    facts = "".join(_facts(run) for run in runs)
    if len(runs) > _MOST_SHOWN:
        facts = f"<details><summary>main settings of the {len(runs)} runs</summary>{facts}</details>"
    names = [run.name for run in runs] if len(runs) <= _MOST_SHOWN else [group.label for group in grouped(runs)]
    title = " vs. ".join(names[:_MOST_SHOWN])
    title += f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return document(title, "Purified OPSD · run report", f"{facts}<nav>{links}</nav>", body)


def _facts(run: RunData) -> str:
    """The main settings of a run in one line."""
    facts = [
        ("model", run.setting("student.source")),
        ("adaptation", run.setting("student.adaptation")),
        ("data", run.setting("data.train.path")),
        ("target", run.setting("distillation.target.family")),
        ("divergence", run.setting("distillation.divergence.kind")),
        ("steps", f"{run.steps:,} of {run.setting('training.steps')}"),
        ("prompts per step", run.setting("training.prompts_per_step")),
        ("responses per prompt", run.setting("rollout.per_prompt")),
        ("learning rate", number(run.setting("optimizer.lr"), 2) if run.setting("optimizer.lr") else None),
        ("seed", run.setting("seed")),
    ]
    truncated, kept = run.data.get("references_truncated"), run.data.get("rows_kept")
    if truncated:
        facts.append(("references truncated", f"{truncated} of {kept} (data.max_reference_tokens)"))
    items = "".join(f"<li>{esc(name)} <b>{esc(value)}</b></li>" for name, value in facts if value is not None)
    return f'<ul class="facts"><li><b>{esc(run.name)}</b></li>{items}{_trackers(run)}</ul>'


def _trackers(run: RunData) -> str:
    """The run in tracking services: a link if its page is known, otherwise its id."""
    items = []
    for service, title in (("wandb", "W&B"), ("mlflow", "MLflow")):
        name, address = run.trackers.get(service), str(run.trackers.get(f"{service}_link", ""))
        if isinstance(name, str):
            linked = address.startswith(("https://", "http://"))
            shown = f'<a href="{esc(address)}" rel="noreferrer">{esc(name)}</a>' if linked else f"<b>{esc(name)}</b>"
            items.append(f"<li>{esc(title)} {shown}</li>")
    return "".join(items)
