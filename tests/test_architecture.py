"""The README's picture of the package, held against the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_popsd"

# What a room may import of the others. A room's own `config.py` is anybody's, and so are the modules in SHARED.
SHARED = {"atomic", "config", "errors", "json_files", "launcher", "output_lock", "ownership", "reading"}
ALLOWED = {
    "distillation": set(),
    "data": {"testbed"},
    "runtime": set(),
    "diagnosis": {"data", "distillation", "evaluation", "megatron", "rollout", "runtime", "training"},
    "report": {"distillation", "evaluation"},
    "observability": {"distillation"},
    "rollout": {"megatron"},
    "megatron": {"data", "distillation", "runtime"},
    "evaluation": {"data", "rollout"},
    "training": {"data", "distillation", "megatron", "observability", "rollout", "runtime"},
    "checkpoint": {"data", "megatron", "runtime", "testbed"},
    "testbed": {"data", "evaluation"},
    "planning": {"distillation", "rollout", "testbed"},
    "config": {
        "data",
        "diagnosis",
        "distillation",
        "evaluation",
        "megatron",
        "observability",
        "rollout",
        "training",
        "testbed",
    },
    "model": {
        "checkpoint",
        "data",
        "diagnosis",
        "evaluation",
        "megatron",
        "observability",
        "report",
        "rollout",
        "runtime",
        "testbed",
        "training",
    },
    "cli": {
        "data",
        "doctor",
        "evaluation",
        "model",
        "observability",
        "planning",
        "report",
        "rollout",
        "runtime",
        "testbed",
    },
    "doctor": set(),
}
MATHEMATICS_OF_DIAGNOSIS = ("config.py", "groups.py", "pieces.py", "push.py", "record.py", "shards.py", "tokens.py")
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


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def rooms() -> list[str]:
    return sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def test_every_room_has_a_rule() -> None:
    assert rooms() == sorted(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_dependencies_point_one_way(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        for module in imports(file):
            parts = module.split(".")
            if parts[0] != "nemo_popsd" or len(parts) < 2 or parts[-1] == "config":
                continue
            allowed = {*ALLOWED[room], room, *SHARED}
            assert parts[1] in allowed, f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("room", FREE_OF_MEGATRON)
def test_rooms_that_know_nothing_of_megatron_or_nemo(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        assert not {m.split(".")[0] for m in imports(file)} & {"megatron", "nemo"}, file.relative_to(ROOT)


def test_the_engine_interface_and_the_sampling_know_nothing_of_megatron() -> None:
    for name in ("engine.py", "sampling.py", "storage.py", "config.py"):
        assert not any("megatron" in module for module in imports(PACKAGE / "rollout" / name))
    for file in (PACKAGE / "rollout" / "vllm").rglob("*.py"):
        assert not any("megatron" in module for module in imports(file)), file.name


@pytest.mark.parametrize("name", MATHEMATICS_OF_DIAGNOSIS)
def test_the_mathematics_of_the_diagnosis_knows_neither_megatron_nor_the_loop(name: str) -> None:
    rooms = {
        module.split(".")[1] for module in imports(PACKAGE / "diagnosis" / name) if module.startswith("nemo_popsd.")
    }
    assert rooms <= {"atomic", "config", "diagnosis", "distillation", "errors", "evaluation", "json_files", "ownership"}


def test_the_report_needs_the_standard_library_and_yaml_alone() -> None:
    for file in (PACKAGE / "report").rglob("*.py"):
        foreign = {m.split(".")[0] for m in imports(file)} - set(sys.stdlib_module_names)
        assert foreign <= {"yaml", "nemo_popsd"}, file.relative_to(ROOT)


def test_the_readme_lists_every_room_and_command() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^  (\w+)/ ", readme, flags=re.MULTILINE)
    assert sorted(listed) == rooms()
    commands = ["train", "evaluate", "diagnose", "report", "export", "convert", "plan", "rollouts", "config", "doctor"]
    for command in commands:
        assert f"popsd {command}" in readme


def test_modules_stay_small() -> None:
    files = subprocess.run(["git", "ls-files", "nemo_popsd/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in files.stdout.split()}
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > 400}
