"""The packages that the code imports are those that pyproject.toml declares."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from nemo_popsd.doctor.packages import Requirement, declared
from tests.test_architecture import PACKAGE, ROOT, imports

COMES_WITH = {"antlr4": "math-verify", "latex2sympy2_extended": "math-verify"}
"""Modules that a declared distribution requires in the version that it needs, and that are used only with it."""
LAUNCHERS = {"nvidia_resiliency_ext"}
"""Imported only in a process that they have started (`nemo_popsd/parallel/heartbeats.py`)."""
OF_VLLM = PACKAGE / "rollout" / "vllm" / "serving"
"""Runs in vLLM's environment, which has its own packages."""
SHARED = {"megatron.core": "megatron-core", "megatron.bridge": "megatron-bridge"}
"""Modules below a name that several distributions share."""
DOCUMENTS = ROOT / "docs"


def third_party(file: Path) -> set[str]:
    """The modules that a file imports and neither Python nor this package has."""
    outside = {m for m in imports(file) if m.split(".")[0] not in {*sys.stdlib_module_names, *LAUNCHERS, "nemo_popsd"}}
    return {
        next((name for name in SHARED if f"{module}.".startswith(f"{name}.")), module.split(".")[0])
        for module in outside
    }


@cache
def installed() -> Mapping[str, list[str]]:
    """Top-level module to its distributions."""
    return packages_distributions()


def distributions_of(module: str) -> set[str]:
    """The distributions that provide a module, by their canonical names."""
    if module in SHARED:
        return {SHARED[module]}
    found = installed().get(module, [COMES_WITH.get(module, module)])
    return {name.lower().replace("_", "-") for name in found} | {COMES_WITH.get(module, "")}


def undeclared(files: list[Path], requirements: list[Requirement]) -> dict[str, str]:
    """Modules that no declared distribution has, each with a file that imports it."""
    names = {requirement.name for requirement in requirements}
    return {module: file.name for file in files for module in third_party(file) if not distributions_of(module) & names}


def test_every_import_is_declared() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(OF_VLLM)]
    assert len(files) > 250
    requirements = declared()[1]
    assert undeclared(files, requirements) == {}
    without = [entry for entry in requirements if entry.name not in ("numpy", "pyyaml")]
    assert set(undeclared(files, without)) == {"numpy", "yaml"}


def test_what_only_an_extra_declares_is_known() -> None:
    """Nothing that a run imports is in an extra, except for Megatron-Bridge, which pip cannot resolve without CUDA."""
    files = [file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(OF_VLLM)]
    always = [entry for entry in declared()[1] if entry.extra is None]
    assert set(undeclared(files, always)) <= {
        "megatron.bridge",
        "transformer_engine",
        "wandb",
        "mlflow",
        "nemo_run",
        "simpy",
    }


def test_the_extras_of_the_metadata_are_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (DOCUMENTS / "install.md").read_text()
    assert [extra for extra in project["optional-dependencies"] if f"[{extra}]" not in text and extra != "dev"] == []


def test_mypy_skips_only_what_the_package_does_not_import() -> None:
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    skipped, followed = (
        [pattern for override in overrides if override.get("follow_imports") == how for pattern in override["module"]]
        for how in ("skip", "silent")
    )

    def matches(module: str, patterns: list[str]) -> bool:
        return any(f"{module}.".startswith(f"{pattern.removesuffix('.*')}.") for pattern in patterns)

    assert matches("transformers.models.llama", skipped)
    imported = {module for file in PACKAGE.rglob("*.py") for module in imports(file)}
    followed_inside = [pattern for pattern in followed if pattern.endswith(".*")]
    assert [m for m in imported if matches(m, skipped) and not matches(m, followed_inside)] == []
