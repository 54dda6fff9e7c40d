"""Reads the directory of a training run.

The following files are read; the page states which are missing:

    config.yaml                           the resolved configuration; required
    metrics.jsonl                         train/* and validation/* by step
    validation/step-<step>/               evaluations during training: summary.json, problems.jsonl, samples-*.jsonl,
                                          scores.jsonl (see `nemo_popsd.evaluation`); they take precedence over metrics
    evaluation/**/*.json                  further evaluations, one summary each
    diagnosis/{before,after}/             see `nemo_popsd.diagnosis.record`
    views/*/views.json                    see `nemo_popsd.diagnosis.views.record`
    checkpoints/final/manifest.json       versions and layout
    data.json                             counts of the training rows
    trackers.json                         ids in tracking services
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from nemo_popsd.diagnosis.schema import RolloutRecord, Summary
from nemo_popsd.diagnosis.views.record import ViewScores, read_views
from nemo_popsd.errors import UserError
from nemo_popsd.files.json_files import checksum, damaged, open_regular, read_json, read_json_lines

TRAIN, ROLLOUT, COST, GUARD, VALIDATION = "train/", "rollout/", "cost/", "guard/", "validation/"
BEFORE, AFTER = "before", "after"
NOT_OF_AN_ARM = ("name", "output", "overwrite", "seed")
"""Settings in which the runs of an arm may differ."""
_OLDER_NAMES = {"delta_ratio": "norm_ratio", "cos_total_it": "cosine_question", "cos_total_ref": "cosine_reference"}
"""Current names of training metrics by their names in earlier versions."""


@dataclass(frozen=True)
class Diagnosed:
    """The content of the two files of a diagnosis."""

    summary: Summary
    rollouts: list[RolloutRecord]


@dataclass(frozen=True)
class Validation:
    """The results of an evaluation during training."""

    values: dict[str, float]
    """Values by name; entries of a mapping have names such as "marker_rates.Wait"."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals (low, high) by name."""
    directory: Path | None = None
    """Directory of the samples; None if they were not kept."""


@dataclass(frozen=True, eq=False)
class RunData:
    """One run."""

    directory: Path
    config: dict[str, object]
    training: dict[str, list[tuple[float, float]]]
    """(step, value) by name of the metric without prefix; alarms start with `GUARD`, costs with `COST`."""
    validations: dict[int, Validation]
    """Validations by step, ascending."""
    evaluations: list[dict[str, object]] = field(default_factory=list)
    """Summaries of `popsd evaluate`."""
    diagnoses: dict[str, Diagnosed] = field(default_factory=dict)
    """Diagnoses by name of their directory."""
    views: list[ViewScores] = field(default_factory=list)
    """Scores of views before training, one entry per scored student."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Manifest of the final checkpoint."""
    data: Mapping[str, object] = field(default_factory=dict)
    """Counts of the training rows; see `nemo_popsd.data.report`."""
    label: str = ""
    """The name on the page if the name in the configuration is ambiguous."""
    trackers: Mapping[str, object] = field(default_factory=dict)
    """Ids of the run in tracking services, and addresses of its pages there with the suffix `_link`."""

    @property
    def name(self) -> str:
        """The name of the run on the page."""
        return self.label or str(self.config.get("name") or self.directory.name)

    @property
    def before(self) -> Validation | None:
        """The validation at step 0."""
        return self.validations.get(0)

    @property
    def after(self) -> Validation | None:
        """The last validation, unless it was at step 0."""
        last = max(self.validations, default=0)
        return self.validations[last] if last else None

    @property
    def steps(self) -> int:
        """The last step with training metrics."""
        return int(max((step for points in self.training.values() for step, _ in points), default=0))

    def alarms(self, name: str) -> list[tuple[int, str]]:
        """Step and text of the alarms of the quantity `name`; see `nemo_popsd.training.drift`."""
        return [
            (int(step), f"{'rose' if onset > 0 else 'fell'}: the change began after step {abs(onset):.0f}")
            for step, onset in self.training.get(GUARD + name, [])
        ]

    def setting(self, key: str) -> Any:
        """Value of a dotted key of the configuration; None if it is missing."""
        value: object = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def mean(self, name: str) -> float | None:
        """Mean of a training metric over the run."""
        values = [value for _, value in self.training.get(name, []) if math.isfinite(value)]
        return sum(values) / len(values) if values else None


def read_run(directory: Path) -> RunData:
    """Reads a run that is finished or in progress.

    Raises:
        UserError: the directory does not contain a run.
    """
    try:
        with open_regular(directory / "config.yaml") as file:
            config = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            "report",
            got=f"{str(directory)!r} without a readable config.yaml ({type(error).__name__})",
            need="the output directory of a training run",
            fix="correct the path",
        ) from None
    training, logged = _metrics(directory / "metrics.jsonl")
    validations = {step: Validation(values) for step, values in logged.items()}
    for folder in sorted((directory / "validation").glob("step-*")):
        summary = _object(folder / "summary.json")
        if summary and folder.name.removeprefix("step-").isdigit():
            values, intervals = flat_figures(summary, folder)
            validations[int(folder.name.removeprefix("step-"))] = Validation(values, intervals, folder)
    final = directory / "checkpoints" / "final" / "manifest.json"
    manifest = _object(final) or {}
    if not all(isinstance(manifest.get(name, {}), dict) for name in ("versions", "layout")):
        raise damaged(final, "versions or layout are not objects")
    return RunData(
        directory=directory,
        config=config if isinstance(config, dict) else {},
        training=training,
        validations=dict(sorted(validations.items())),
        evaluations=[
            summary
            for file in sorted((directory / "evaluation").glob("**/*.json"))
            if (summary := _object(file)) and "accuracy" in summary
        ],
        diagnoses={
            folder.name: diagnosed
            for folder in sorted((directory / "diagnosis").glob("*"))
            if (diagnosed := read_diagnosis(folder)) is not None
        },
        views=[
            scores for folder in sorted((directory / "views").glob("*")) if (scores := read_views(folder)) is not None
        ],
        manifest=manifest,
        data=_object(directory / "data.json") or {},
        trackers=_tolerated(directory / "trackers.json"),
    )


def read_diagnosis(directory: Path) -> Diagnosed | None:
    """The diagnosis in `directory`; None if it is missing or incomplete.

    Raises:
        UserError: its files were changed after the diagnosis.
    """
    summary = _object(directory / "summary.json")
    rollouts = read_lines(directory / "rollouts.jsonl")
    if not summary or not rollouts:
        return None
    if "sum" in summary:  # absent in diagnoses of older versions
        if summary.pop("sum") != checksum(summary):
            raise damaged(directory / "summary.json", "it was changed after it was written")
        if summary["rollouts_sha256"] != hashlib.sha256((directory / "rollouts.jsonl").read_bytes()).hexdigest():
            raise damaged(directory / "rollouts.jsonl", "it was changed after it was written")
    return Diagnosed(cast(Summary, summary), cast(list[RolloutRecord], rollouts))


def flat_figures(
    summary: Mapping[str, object], where: object = "summary"
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The numbers of an evaluation's summary and their intervals, by name.

    Raises:
        UserError: an interval is not a pair of numbers; the message names the file, `where`.
    """
    values: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping) and name != "intervals":
            inner = {f"{name}.{key}": _float(number) for key, number in value.items()}
            values |= {key: number for key, number in inner.items() if number is not None}
        elif (number := _float(value)) is not None:
            values[name] = number
    intervals: dict[str, tuple[float, float]] = {}
    stored = summary.get("intervals")
    for name, ends in stored.items() if isinstance(stored, Mapping) else ():
        numbers = [_float(end) for end in ends] if isinstance(ends, list) else []
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise damaged(where, f"the interval of {name} is {ends!r}")
        intervals[name] = numbers[0], numbers[1]
    return values, intervals


def flat_settings(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A configuration by dotted names."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _metrics(file: Path) -> tuple[dict[str, list[tuple[float, float]]], dict[int, dict[str, float]]]:
    """Training and validation metrics. The last line of a step is used, since a resumed run repeats steps."""
    training: dict[str, dict[int, float]] = {}
    validations: dict[int, dict[str, float]] = {}
    for line in read_lines(file):
        step = line.get("step", 0)
        if not isinstance(step, int) or isinstance(step, bool):
            raise damaged(file, f"step={step!r}")
        for key, raw in line.items():
            value = _float(raw)
            if value is None:
                continue
            if key.startswith((TRAIN, ROLLOUT)):
                name = key.removeprefix(TRAIN).removeprefix(ROLLOUT)
                training.setdefault(_OLDER_NAMES.get(name, name), {})[step] = value
            elif key.startswith((GUARD, COST)):
                training.setdefault(key, {})[step] = value
            elif key.startswith(VALIDATION):
                validations.setdefault(step, {})[key.removeprefix(VALIDATION)] = value
    curves = {name: [(float(step), points[step]) for step in sorted(points)] for name, points in training.items()}
    return curves, dict(sorted(validations.items()))


def _float(value: object) -> float | None:
    """`value` as a number, including "nan" and "inf", which are stored as text; None for other values."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file, without a partial last line; empty if the file is missing.

    Raises:
        UserError: another line is damaged.
    """
    if not file.exists():
        return []
    objects = []
    for where, value in read_json_lines(file, skip_partial=True):
        if not isinstance(value, dict):
            raise damaged(where, "not an object")
        objects.append(value)
    return objects


def _object(file: Path) -> dict[str, object] | None:
    if not file.exists():
        return None
    value = read_json(file)
    if not isinstance(value, dict):
        raise damaged(file, "not an object")
    return value


def _tolerated(file: Path) -> dict[str, object]:
    """Like `_object`, for an optional file."""
    try:
        return _object(file) or {}
    except UserError:
        return {}
