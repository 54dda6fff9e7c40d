"""Installed distributions against the ranges that the project declares. Nothing is imported but `packaging`."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nemo_popsd.doctor.findings import Finding, State

DISTRIBUTION = "nemo_popsd"

_NEEDED_EXTRAS = ("bridge",)
"""Extras of pyproject.toml that a run needs, although pip must not resolve them everywhere."""

_NOTES = {
    "packaging": "without it no version was compared with its range",
    "megatron-bridge": "install with --no-deps where there is no CUDA",
    "transformer-engine": "the fused layers on a GPU; without it the local layers run there (student.layers=local)",
    "wandb": "only for observability.wandb",
    "apex": "fused kernels of NVIDIA's apex, built from source; PyPI's package of that name is another one",
}

_SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Requirement:
    """One line of the project's dependencies.

    Attributes:
        line: as pip takes it, e.g. ``"nemo_toolkit[common]>=2.6,<3.1"``.
        name: the distribution.
        range: version specifiers, "" for any version.
        extra: the extra that asks for it; None for what every installation needs.
    """

    line: str
    name: str
    range: str
    extra: str | None = None

    @property
    def needed(self) -> bool:
        """Whether a run cannot do without it, whatever the machine."""
        return self.extra is None or self.extra in _NEEDED_EXTRAS


def declared() -> tuple[str, list[Requirement]]:
    """The Python range and the requirements of this project.

    Those of the source tree, where the package is imported from one: it may be newer than what is installed. Otherwise
    the installed distribution's. Neither there: no range and no requirements.
    """
    project = _source_project()
    if project is not None:
        extras = [(line, extra) for extra, lines in project.get("optional-dependencies", {}).items() for line in lines]
        lines = [(line, None) for line in project["dependencies"]] + extras
        return project["requires-python"], [_parse(line, extra) for line, extra in lines if extra != "dev"]
    try:
        found = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "", []
    requirements = []
    for entry in found.get_all("Requires-Dist") or []:
        line, _, marker = (part.strip() for part in entry.partition(";"))
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)
        requirements.append(_parse(line, extra[1] if extra else None))
    return found["Requires-Python"] or "", [entry for entry in requirements if entry.extra != "dev"]


def examine_packages() -> list[Finding]:
    """One finding for Python, the project and every declared distribution, and one for apex."""
    python_range, requirements = declared()
    python = platform.python_version()
    return [
        Finding("packages", "python", _compare(python, python_range), python, python_range),
        _own(),
        *(_examine(entry, needed=entry.needed) for entry in requirements),
        _examine(Requirement("apex", "apex", "", "built from source"), needed=False),
    ]


def missing_requirements() -> list[str]:
    """Lines for pip: the needed distributions of which no version is installed."""
    return [entry.line for entry in declared()[1] if entry.needed and _version(entry.name) is None]


def _own() -> Finding:
    version = _version(DISTRIBUTION)
    if version is not None:
        return Finding("packages", DISTRIBUTION, "ok", version)
    if _source_project() is not None:
        return Finding("packages", DISTRIBUTION, "ok", "source tree", note=f"not installed; runs from {_SOURCE}")
    return Finding("packages", DISTRIBUTION, "missing", note="neither installed nor a source tree: no ranges known")


def _examine(requirement: Requirement, *, needed: bool) -> Finding:
    version = _version(requirement.name)
    note = _NOTES.get(requirement.name, "")
    if version is None:
        state: State = "missing" if needed else "optional"
        return Finding("packages", requirement.name, state, "", requirement.range, note)
    return Finding("packages", requirement.name, _compare(version, requirement.range), version, requirement.range)


def _compare(version: str, specifiers: str) -> State:
    """A pre-release counts as its version, as in the containers (2.10.0a0+...)."""
    parsed = _specifiers(specifiers)
    return "ok" if parsed is None or parsed.contains(version, prereleases=True) else "outside"


def _specifiers(text: str):  # type: ignore[no-untyped-def]  # packaging may be absent
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return None
    return SpecifierSet(text)


def _version(name: str) -> str | None:
    """The version that an import would find: of the first distribution of that name on the path."""
    return next(_versions(name), None)


def _versions(name: str) -> Iterator[str]:
    wanted = _canonical(name)
    for distribution in metadata.distributions(name=name):
        # The directory of a distribution that an interrupted pip left behind has no name.
        if distribution.metadata["Name"] and _canonical(distribution.metadata["Name"]) == wanted:
            yield distribution.version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _parse(line: str, extra: str | None) -> Requirement:
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?", line)
    assert match is not None, line
    return Requirement(line, _canonical(match[1]), match[2].strip(), extra)


def _source_project() -> dict | None:
    """The [project] table of the source tree that this module lies in; None if it lies elsewhere."""
    file = _SOURCE / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return project if _canonical(project.get("name", "")) == _canonical(DISTRIBUTION) else None
