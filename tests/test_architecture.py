"""Direction of imports between packages, forbidden imports, and packages named in the documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_popsd"

# From bottom to top. A package imports only packages of lower layers. Packages of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("files", "settings", "embedded", "compat"),
    ("runtime",),
    ("parallel",),
    ("data", "distillation"),
    ("megatron",),
    ("rollout",),
    ("observability", "evaluation"),
    ("training",),
    ("diagnosis",),
    ("testbed", "report"),
    ("config",),
    ("checkpoint", "planning", "doctor"),  # a checkpoint has the whole configuration of its run
    ("model",),
    ("rehearsal",),
    ("commands",),
    ("cli",),
    ("launch", "__main__"),
)
FREE_OF_MEGATRON = (
    "config",
    "data",
    "distillation",
    "evaluation",
    "observability",
    "planning",
    "testbed",
    "cli",
    "doctor",
    "report",
)
FREE_OF_TORCH = ("files", "settings", "embedded", "config", "planning", "report")
MATHEMATICS_OF_DIAGNOSIS = (
    *("config.py", "groups.py", "pieces.py", "push.py", "record.py", "shards.py", "tokens.py"),
    *("views/record.py", "views/scores.py", "views/tokens.py", "views/verdicts.py"),
)


def imports(file: Path) -> set[str]:
    """Every module that a file imports: at the top, inside functions, and under TYPE_CHECKING."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            assert node.module
            modules.add(node.module)
            if node.module == "nemo_popsd":
                modules.update(f"nemo_popsd.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules


def packages() -> list[str]:
    return sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def graph(root: Path) -> dict[str, dict[str, str]]:
    """For each package and top-level module of `root`, those that it imports, with one importing file each."""
    name = root.name
    edges: dict[str, dict[str, str]] = {}
    for file in sorted(root.rglob("*.py")):
        source = file.relative_to(root).parts[0].removesuffix(".py")
        if source == "__init__":
            continue
        targets = edges.setdefault(source, {})
        for module in imports(file):
            parts = module.split(".")
            if parts[0] != name or len(parts) < 2 or parts[1] == source:
                continue
            if (root / parts[1]).is_dir() or (root / f"{parts[1]}.py").is_file():
                targets.setdefault(parts[1], str(file.relative_to(root)))
    return edges


def circle(edges: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Packages that form an import cycle; empty if there is none."""
    free: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for target in edges.get(path[-1], {}):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in free and (result := follow([*path, target])):
                return result
        free.add(path[-1])
        return []

    for source in edges:
        if result := follow([source]):
            return result
    return []


def upward(edges: Mapping[str, Mapping[str, str]], layers: Sequence[Sequence[str]]) -> list[str]:
    """Imports of packages that are not in a lower layer."""
    level = {package: index for index, layer in enumerate(layers) for package in layer}
    return [
        f"{file} imports {target}"
        for source, targets in edges.items()
        for target, file in targets.items()
        if level[target] >= level[source]
    ]


def test_there_is_no_import_cycle() -> None:
    assert circle(graph(PACKAGE)) == []


def test_packages_import_only_lower_layers() -> None:
    edges = graph(PACKAGE)
    known = {*edges, *(target for targets in edges.values() for target in targets)}
    assert known == {package for layer in LAYERS for package in layer}
    assert upward(edges, LAYERS) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from nemo_popsd.high.config import Settings",
        "from nemo_popsd import high",
        "import nemo_popsd.high.config",
        "def load():\n    from nemo_popsd.high import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nemo_popsd.high import x",
    ],
)
def test_an_upward_import_is_found_wherever_it_is(tmp_path: Path, statement: str) -> None:
    root = tmp_path / "nemo_popsd"
    for name, text in (("low", statement), ("middle", "import nemo_popsd.low"), ("high", "import nemo_popsd.middle")):
        (root / name).mkdir(parents=True)
        (root / name / "config.py").write_text(text)
    edges = graph(root)
    assert set(circle(edges)) == {"low", "middle", "high"}
    assert upward(edges, [["low"], ["middle"], ["high"]]) == ["low/config.py imports high"]
    (root / "low" / "config.py").write_text("import json")
    assert circle(graph(root)) == []
    assert upward(graph(root), [["low"], ["middle"], ["high"]]) == []


@pytest.mark.parametrize("package", FREE_OF_MEGATRON)
def test_packages_that_import_neither_megatron_nor_nemo(package: str) -> None:
    for file in (PACKAGE / package).rglob("*.py"):
        assert not {m.split(".")[0] for m in imports(file)} & {"megatron", "nemo"}, file.relative_to(ROOT)


@pytest.mark.parametrize("package", FREE_OF_TORCH)
def test_packages_that_do_not_import_torch(package: str) -> None:
    for file in (PACKAGE / package).rglob("*.py"):
        assert "torch" not in {m.split(".")[0] for m in imports(file)}, file.relative_to(ROOT)


def test_the_engine_interface_the_sampling_and_vllm_do_not_import_megatron() -> None:
    for name in ("engine.py", "sampling.py", "storage.py", "config.py"):
        assert not any("megatron" in module for module in imports(PACKAGE / "rollout" / name))
    for file in (PACKAGE / "rollout" / "vllm").rglob("*.py"):
        assert not any("megatron" in module for module in imports(file)), file.name


@pytest.mark.parametrize("name", MATHEMATICS_OF_DIAGNOSIS)
def test_the_mathematics_of_the_diagnosis_needs_neither_a_model_nor_an_engine(name: str) -> None:
    modules = {module for module in imports(PACKAGE / "diagnosis" / name) if module.startswith("nemo_popsd.")}
    allowed = {"diagnosis", "distillation", "errors", "evaluation", "files", "parallel", "settings"}
    assert {module.split(".")[1] for module in modules if module.split(".")[-1] != "config"} <= allowed


def test_the_report_needs_only_the_standard_library_and_yaml() -> None:
    for file in (PACKAGE / "report").rglob("*.py"):
        foreign = {m.split(".")[0] for m in imports(file)} - set(sys.stdlib_module_names)
        assert foreign <= {"yaml", "nemo_popsd"}, file.relative_to(ROOT)


def test_the_documents_name_every_package_and_command() -> None:
    readme = (ROOT / "README.md").read_text()
    documents = readme + "".join(file.read_text() for file in sorted((ROOT / "docs").rglob("*.md")))
    assert [package for package in packages() if not re.search(rf"\b{package}/", documents)] == []
    commands = [
        "init",
        "train",
        "evaluate",
        "diagnose",
        "report",
        "export",
        "convert",
        "plan",
        "rehearse",
        "rollouts",
        "config",
        "doctor",
    ]
    for command in commands:
        assert f"popsd {command}" in documents


def test_modules_stay_small() -> None:
    files = subprocess.run(["git", "ls-files", "nemo_popsd/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in files.stdout.split()}
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > 400}
