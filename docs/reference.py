"""The generated reference pages: settings, metrics, modules and public API, from the strings that declare them.

Standard library alone, besides the configuration, which imports neither torch nor yaml: the site is built without the
environment of a run. `docs/hooks.py` puts the pages into the site.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_popsd"
sys.path.insert(0, str(ROOT))

from nemo_popsd.config.description import Setting, class_node, field_texts, settings  # noqa: E402
from nemo_popsd.config.schema import PopsdConfig  # noqa: E402
from nemo_popsd.planning.config import PlanConfig  # noqa: E402

MODEL = "nemo_popsd.model"
"""The package with the model class, which is first on the page of the API."""
NOT_LOGGED = ("confidence", "intervals")
"""Fields of an evaluation's summary that are in its summary.json and in no logger."""
KEYS = {"pass_at": "/K", "marker_rates": "/MARKER"}
"""Fields of an evaluation's summary that are mappings, with a word for their keys."""


class Metric(NamedTuple):
    """One number that is logged, or one number for each key of a mapping."""

    name: str
    """As in metrics.jsonl; for a mapping it ends in a word in capitals, in whose place the key is."""
    text: str
    """The string under the field."""


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def metrics() -> Iterator[Metric]:
    """Every metric of a training step and every figure of an evaluation, under the names in metrics.jsonl."""
    from nemo_popsd.observability.metrics import GROUPS, PREFIX, StepMetrics

    declarations = PACKAGE / "observability/metrics.py"
    for name, text in field_texts(class_node(declarations, StepMetrics.__name__)).items():
        # Per-token statistics are one field, a mapping: each is declared beside its formula.
        if name == "statistics":
            yield from (Metric(PREFIX + statistic, text) for statistic, text in declared_statistics().items())
        elif name in GROUPS:
            prefix, group = GROUPS[name]
            texts = field_texts(class_node(declarations, group.__name__))
            yield from (Metric(prefix + entry, text) for entry, text in texts.items())
        else:
            yield Metric(PREFIX + name, text)
    # The class is not imported, since it needs numpy.
    for name, text in field_texts(class_node(PACKAGE / "evaluation/summary.py", "EvaluationSummary")).items():
        if name not in NOT_LOGGED:
            yield Metric(f"validation/{name}{KEYS.get(name, '')}", text)


def declared_statistics() -> dict[str, str]:
    """Name of each per-token statistic with symbol, unit and meaning."""
    import nemo_popsd.observability.metrics as module

    found = {}
    for declared in getattr(module, "DECLARED", ()):
        unit = f" ({declared.unit})" if declared.unit else ""
        found[declared.name] = f"{declared.symbol}{unit}: {declared.meaning}"
    return found


def settings_page() -> str:
    """Markdown: each setting under a heading of its own, so that other pages can link to it."""
    lines = [
        "# Settings",
        "",
        "Generated from the dataclasses that declare the settings. Set one in a configuration file, or on the command",
        "line as `section.setting=value`. Unknown keys and numbers outside their bounds are refused.",
        "`popsd config CONF` prints the resolved configuration.",
        "",
        "Defaults are those of the code; `conf/*.yaml` names the origin of each number that it sets.",
        "",
        "## The run {: #run }",
        "",
    ]
    for setting in settings(PopsdConfig):
        lines += entry(setting)
    lines += ["## `popsd plan` {: #plan }", "", inspect.cleandoc(PlanConfig.__doc__ or ""), ""]
    for setting in settings(PlanConfig):
        lines += entry(setting)
    return "\n".join(lines)


def entry(setting: Setting) -> list[str]:
    """One setting, or the heading of a section."""
    if not setting.type:
        return [f"## `{setting.name}` {{: #{setting.name} }}", "", paragraph(setting.text), ""]
    facts = [f"`{setting.type}`", f"default `{setting.default}`", *([setting.allowed] if setting.allowed else [])]
    return [f"### `{setting.name}` {{: #{setting.name} }}", "", " · ".join(facts), "", paragraph(setting.text), ""]


def metrics_page() -> str:
    """Markdown: a table for each prefix."""
    lines = [
        "# Metrics",
        "",
        "Generated from the declarations. Each name is the key in `<output>/metrics.jsonl`, in TensorBoard, Weights &",
        "Biases and MLflow. A metric that a step does not measure is absent. A word in capitals is a key: pass@8 is",
        "`validation/pass_at/8`.",
        "",
    ]
    groups: dict[str, list[Metric]] = {}
    for metric in metrics():
        groups.setdefault(metric.name.partition("/")[0], []).append(metric)
    for name, group in groups.items():
        lines += [f"## `{name}/`", "", "| name | meaning |", "|---|---|"]
        lines += [f"| `{metric.name}` | {cell(metric.text)} |" for metric in group]
        lines.append("")
    return "\n".join(lines)


def modules_page() -> str:
    """Markdown: every module with the first sentence of its docstring, by folder."""
    lines = ["# Modules", "", "Generated from the docstrings: what each file does, by folder.", ""]
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        if not files:
            continue
        own = folder / "__init__.py"
        lines += [f"## `{folder.relative_to(ROOT)}/`", ""]
        lines += [summary(own), ""] if own.exists() else []
        lines += ["| module | purpose |", "|---|---|"]
        lines += [f"| `{path.name}` | {cell(summary(path))} |" for path in files]
        lines.append("")
    return "\n".join(lines)


def api_page() -> str:
    """Markdown for mkdocstrings: what the packages export, and the interfaces that an extension implements."""
    lines = [
        "# Python API",
        "",
        "What the packages export in `__all__`, and the protocols that an extension implements. The headings name the",
        "modules from which to import them.",
        "",
    ]
    groups: dict[str, list[str]] = {MODEL: []}
    for name in [*exported(), *protocols()]:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in groups.items():
        lines += [f"## `{module}`", ""]
        for name in names:
            lines += [f"::: {name}", ""]
    return "\n".join(lines)


def exported() -> list[str]:
    """Dotted names that a package lists in `__all__`."""
    found = []
    for path in sorted(PACKAGE.rglob("__init__.py")):
        for node in parsed(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found += [f"{dotted(path.parent)}.{name}" for name in sorted(ast.literal_eval(node.value))]
    return found


def protocols() -> list[str]:
    """Dotted names of the public protocols that no package exports."""
    known = {name.rpartition(".")[2] for name in exported()}
    return [
        f"{dotted(path.with_suffix(''))}.{node.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).split("[")[0] == "Protocol" for base in node.bases)
        and not node.name.startswith("_")
        and node.name not in known
    ]


def dotted(path: Path) -> str:
    """The import name of a file or folder."""
    return ".".join(path.relative_to(ROOT).parts)


def summary(path: Path) -> str:
    """First paragraph of a module's docstring, in one line."""
    text = ast.get_docstring(parsed(path)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def paragraph(text: str) -> str:
    """A docstring as Markdown: paragraphs, none of them taken for code."""
    return textwrap.dedent(text).replace("<", "&lt;")


def cell(text: str) -> str:
    """A docstring in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {
    "reference/settings.md": settings_page,
    "reference/metrics.md": metrics_page,
    "reference/api.md": api_page,
    "reference/modules.md": modules_page,
}
"""Path in the site to what writes the page."""


if __name__ == "__main__":
    for page in PAGES.values():
        print(page())
