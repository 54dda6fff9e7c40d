"""Comparison of installed distributions with the ranges that the project declares. Imports only `packaging`."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from nemo_popsd.compat.stacks import closest
from nemo_popsd.doctor.findings import Finding, State

DISTRIBUTION = "nemo_popsd"

_NEEDED_EXTRAS = ("bridge",)
"""Extras of pyproject.toml that a run needs, although pip cannot resolve them on every machine."""

_NOTES = {
    "packaging": "without it, versions are not compared with their ranges",
    "megatron-bridge": "install with --no-deps on a machine without CUDA",
    "transformer-engine": "fused layers on a GPU; without it, a GPU uses the local layers (student.layers=local)",
    "wandb": "only for observability.wandb",
    "apex": "fused kernels of NVIDIA's apex, built from source; the package of that name on PyPI is a different one",
}

_SOURCE = Path(__file__).parents[2]


_Project = TypedDict(
    "_Project", {"requires-python": str, "dependencies": list[str], "optional-dependencies": dict[str, list[str]]}
)


@dataclass(frozen=True)
class Requirement:
    """One line of the project's dependencies.

    Attributes:
        line: requirement for pip, e.g. ``"nemo_toolkit[common]>=2.6,<3.1"``.
        name: the distribution.
        range: version specifiers; "" for any version.
        extra: the extra that requires it; None if every installation does.
    """

    line: str
    name: str
    range: str
    extra: str | None = None

    @property
    def needed(self) -> bool:
        """Whether every run needs it."""
        return self.extra is None or self.extra in _NEEDED_EXTRAS


def declared() -> tuple[str, list[Requirement]]:
    """The Python range and the requirements of this project.

    They come from the source tree if the package is imported from one, since it may be newer than the installed
    distribution; otherwise from the installed distribution. Without either, both are empty.
    """
    project = _source_project()
    if project is not None:
        lines: list[tuple[str, str | None]] = [(line, None) for line in project["dependencies"]]
        lines += [(line, extra) for extra, group in project.get("optional-dependencies", {}).items() for line in group]
        return project["requires-python"], _parsed(lines)
    try:
        installed = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "", []
    entries: list[tuple[str, str | None]] = []
    for entry in installed.get_all("Requires-Dist") or []:
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", entry.partition(";")[2])
        entries.append((entry, extra[1] if extra else None))
    return installed["Requires-Python"] or "", _parsed(entries)


def _parsed(entries: Sequence[tuple[str, str | None]]) -> list[Requirement]:
    """The requirements of this system, without those of the tests, from lines and their extras."""
    requirements = []
    for entry, extra in entries:
        line, _, marker = (part.strip() for part in entry.partition(";"))
        system = re.search(r"""platform_system\s*==\s*['"](\w+)['"]""", marker)
        if extra != "dev" and (system is None or system[1] == platform.system()):
            requirements.append(_parse(line, extra))
    return requirements


def examine_packages() -> list[Finding]:
    """One finding for Python, the project, every declared distribution, apex, and the stack that they form."""
    python_range, requirements = declared()
    python = platform.python_version()
    return [
        Finding("packages", "python", _compare(python, python_range), python, python_range),
        _examine_project(),
        *(_examine(entry, needed=entry.needed) for entry in requirements),
        _examine(Requirement("apex", "apex", "", "built from source"), needed=False),
        *_examine_stack(python, [entry.name for entry in requirements]),
    ]


def missing_requirements() -> list[str]:
    """Requirements for pip of the needed distributions that are not installed."""
    return [entry.line for entry in declared()[1] if entry.needed and _version(entry.name) is None]


def _examine_stack(python: str, names: list[str]) -> list[Finding]:
    """Whether the installed versions are tested together; nothing without `packaging` or megatron-core."""
    installed = {name: version for name in names if (version := _version(name)) is not None}
    if "megatron-core" not in installed or "packaging" not in installed:
        return []
    versions = {"python": python, **installed}
    stack = closest(versions)
    outside = [f"{name} {versions[name]}, not {stack.ranges[name]}" for name in stack.outside(versions)]
    if not outside:
        return [Finding("packages", "stack", "ok", stack.container, note="tested together")]
    need = f"the versions of one stack; the closest is {stack.container}"
    return [Finding("packages", "stack", "outside", "; ".join(outside), need)]


def _examine_project() -> Finding:
    version = _version(DISTRIBUTION)
    if version is not None:
        return Finding("packages", DISTRIBUTION, "ok", version)
    if _source_project() is not None:
        return Finding("packages", DISTRIBUTION, "ok", "source tree", note=f"not installed; runs from {_SOURCE}")
    note = "neither installed nor a source tree, so the ranges are unknown"
    return Finding("packages", DISTRIBUTION, "missing", note=note)


def _examine(requirement: Requirement, *, needed: bool) -> Finding:
    version = _version(requirement.name)
    note = _NOTES.get(requirement.name, "")
    if version is None:
        state: State = "missing" if needed else "optional"
        return Finding("packages", requirement.name, state, "", requirement.range, note)
    return Finding("packages", requirement.name, _compare(version, requirement.range), version, requirement.range)


def _compare(version: str, specifiers: str) -> State:
    """Pre-releases are accepted, since containers have such versions (2.10.0a0+...)."""
    allowed = _specifiers(specifiers)
    return "ok" if allowed is None or allowed.contains(version, prereleases=True) else "outside"


def _specifiers(text: str):  # type: ignore[no-untyped-def]  # packaging may be absent
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return None
    return SpecifierSet(text)


def _version(name: str) -> str | None:
    """The version that an import finds: that of the first distribution of that name on the path."""
    return next(_versions(name), None)


def _versions(name: str) -> Iterator[str]:
    wanted = _canonical(name)
    for distribution in metadata.distributions(name=name):
        # A directory that an interrupted pip left behind has no name.
        if distribution.metadata["Name"] and _canonical(distribution.metadata["Name"]) == wanted:
            yield distribution.version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _parse(line: str, extra: str | None) -> Requirement:
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?", line)
    assert match is not None, line
    return Requirement(line, _canonical(match[1]), match[2].strip(), extra)


def _source_project() -> _Project | None:
    """The [project] table of the source tree that contains this module; None if there is none."""
    file = _SOURCE / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return project if _canonical(project.get("name", "")) == _canonical(DISTRIBUTION) else None
