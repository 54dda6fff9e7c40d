"""The generated reference is complete, and the pages name settings and files that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from typing import Any

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.planning.config import PlanConfig
from tests.docs.pages import PAGES, ROOT, inline_code, reference

generated = reference()
settings = cache(lambda schema: tuple(generated.settings(schema)))
metrics = cache(lambda: tuple(generated.metrics()))
MADE = {"slurm/env.sh"}
"""The text that a reader copies from an example."""


def declared(schema: object, prefix: str = "") -> set[str]:
    """Dotted names of all settings, counted on an instance."""
    found = set()
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        value = getattr(schema, field.name)
        inside = declared(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name}
        found |= inside
    return found


@pytest.mark.parametrize("schema", [PopsdConfig, PlanConfig])
def test_every_setting_has_a_text_a_type_and_a_default(schema: type) -> None:
    listed = settings(schema)
    assert {setting.name for setting in listed if setting.type} == declared(schema())
    assert not [setting.name for setting in listed if not setting.text.strip()]
    assert not [setting.name for setting in listed if setting.type and not setting.default]
    numbers = [setting for setting in listed if re.search(r"int|float", setting.type)]
    assert len(numbers) > 10
    assert not [setting.name for setting in numbers if not re.match(r"(from|above) [\d.e-]", setting.allowed)]


def test_the_page_of_settings_has_a_heading_and_the_text_of_each() -> None:
    page = generated.settings_page()
    for setting in settings(PopsdConfig):
        assert f"{{: #{setting.name} }}" in page
        assert generated.paragraph(setting.text) in page


def test_every_metric_has_a_text_and_is_on_the_page() -> None:
    listed = metrics()
    assert {metric.name.partition("/")[0] for metric in listed} == {"train", "rollout", "cost", "validation"}
    assert not [metric.name for metric in listed if not metric.text.strip()]
    page = generated.metrics_page()
    assert not [metric.name for metric in listed if f"| `{metric.name}` | {generated.cell(metric.text)} |" not in page]


def test_what_a_step_logs_is_what_the_page_lists() -> None:
    from nemo_popsd.observability.metrics import GROUPS, StepMetrics

    values: dict[str, Any] = {field.name: 1.0 for field in dataclasses.fields(StepMetrics)}
    if "statistics" in values:
        values["statistics"] = dict.fromkeys(generated.declared_statistics(), 1.0)
    for name, (_, group) in GROUPS.items():
        values[name] = group(**{field.name: 1.0 for field in dataclasses.fields(group)})
    step = StepMetrics(**values)
    listed = {metric.name for metric in metrics() if not metric.name.startswith("validation/")}
    assert set(step.as_dict()) == listed


def test_what_an_evaluation_logs_is_what_the_page_lists() -> None:
    from nemo_popsd.evaluation.summary import EvaluationSummary

    values: dict[str, Any] = {field.name: 1.0 for field in dataclasses.fields(EvaluationSummary)}
    values |= {"pass_at": {"K": 1.0}, "marker_rates": {"MARKER": 1.0}, "intervals": {}}
    logged = {f"validation/{name}" for name in EvaluationSummary(**values).numbers()}
    assert logged == {metric.name for metric in metrics() if metric.name.startswith("validation/")}


@pytest.mark.parametrize("page", PAGES)
def test_metrics_that_a_page_names_exist(page: str) -> None:
    names = {metric.name for metric in metrics()}
    for code in inline_code(page):
        if re.fullmatch(r"(?:train|rollout|cost|validation)/[a-z]\w*", code):
            assert code in names, f"{page} names {code}"


def test_every_module_is_listed_with_its_purpose() -> None:
    page = generated.modules_page()
    modules = [path for path in (ROOT / "nemo_popsd").rglob("*.py") if path.name != "__init__.py"]
    assert len(re.findall(r"^\| `\w+\.py` \| \S", page, re.MULTILINE)) == len(modules)


def test_the_strings_under_fields_are_read() -> None:
    source = 'class A:\n    a: int = 1\n    """The text."""\n    b: int = 2\n    c = 3\n    """Of no field."""\n'
    [node] = ast.parse(source).body
    assert generated.field_texts(node) == {"a": "The text.", "b": ""}


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_names_exist(page: str) -> None:
    known = {setting.name: setting for schema in (PopsdConfig, PlanConfig) for setting in settings(schema)}
    sections = {name for name, setting in known.items() if not setting.type}
    for code in inline_code(page):
        named = re.fullmatch(r"(?P<name>[a-z_]+(?:\.[a-z_0-9]+)+)(?:=.*)?", code)
        if named is None or named["name"].partition(".")[0] not in sections or code.endswith((".py", ".json", ".md")):
            continue
        name = named["name"]
        # Columns and markers are mappings of the user's.
        assert name in known or name.rpartition(".")[0] in known, f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    roots = [ROOT, ROOT / "nemo_popsd", ROOT / "tests", (ROOT / page).parent]
    for code in inline_code(page):
        if re.fullmatch(r"[\w-]+(?:/[\w.-]+)*/[\w-]+\.(?:py|md|sh|yaml)", code):
            assert code in MADE or any((root / code).exists() for root in roots), f"{page} names {code}"
