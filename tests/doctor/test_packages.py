"""Comparison of installed with declared distributions, in environments of known content."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement as Parsed
from packaging.utils import canonicalize_name

from nemo_popsd.doctor import packages
from nemo_popsd.doctor.packages import declared, examine_packages, missing_requirements
from tests.doctor.clean import ROOT, CleanEnvironment, lend, states

CONTAINER = {
    "torch": "2.10.0a0+b4e4ee81d3.nv25.12",
    "transformer_engine": "2.12.0",
    "apex": "0.1",
    "megatron-core": "0.16.0",
    "megatron-bridge": "0.3.1",
    "nemo_toolkit": "2.7.0",
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment(tmp_path_factory.mktemp("empty") / "venv")


def test_the_declared_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, requirements = declared()
    assert python == project["requires-python"]
    found = {entry.name: entry for entry in requirements}
    for line in project["dependencies"]:
        parsed = Parsed(line)
        entry = found[canonicalize_name(parsed.name)]
        assert Parsed(f"{parsed.name}{entry.range}").specifier == parsed.specifier
        assert entry.needed
    assert found["megatron-bridge"].needed
    assert not found["transformer-engine"].needed
    assert "pytest" not in found


def test_requirements_of_another_system_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = {entry.name for entry in declared()[1]}
    monkeypatch.setattr(packages.platform, "system", lambda: "Darwin")
    assert everywhere - {entry.name for entry in declared()[1]} == ({"triton"} & everywhere)


def test_an_installed_distribution_declares_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from_source = declared()
    lines = [f"Requires-Dist: {e.line}" + (f' ; extra == "{e.extra}"' if e.extra else "") for e in from_source[1]]
    info = tmp_path / "nemo_popsd-0.1.0.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", "Name: nemo_popsd", "Version: 0.1.0", f"Requires-Python: {from_source[0]}"]
    (info / "METADATA").write_text("\n".join([*head, *lines, 'Requires-Dist: pytest ; extra == "dev"']) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "_SOURCE", tmp_path)
    assert declared() == from_source


def test_without_source_and_distribution_nothing_is_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "_SOURCE", tmp_path)
    monkeypatch.setattr(packages, "DISTRIBUTION", "popsd_that_nobody_installed")
    assert declared() == ("", [])
    assert {finding.name: finding.state for finding in examine_packages()} == {
        "python": "ok",
        "popsd_that_nobody_installed": "missing",
        "apex": "optional",
    }


def test_this_environment_has_everything() -> None:
    assert missing_requirements() == []
    assert not {f.name for f in examine_packages() if f.state in ("missing", "outside", "failed")}


def test_transformer_engine_is_optional() -> None:
    found = {finding.name: finding for finding in examine_packages()}
    assert found["transformer-engine"].state == "optional"
    assert "local layers" in found["transformer-engine"].note


def test_the_report_on_an_empty_environment_names_what_is_missing(empty: CleanEnvironment) -> None:
    done = empty.doctor()
    assert (done.returncode, done.stderr) == (1, "")
    verdict = done.stdout.splitlines()[-1]
    for entry in declared()[1]:
        assert (entry.name in verdict) == entry.needed
    assert "torch is not installed" in done.stdout


def test_an_empty_environment_with_a_configuration_and_all_options(empty: CleanEnvironment, tmp_path: Path) -> None:
    words = ["--json", "--imports", "--gpus", "1", "--sharing", "0", "2", "m", str(ROOT / "conf" / "tiny.yaml")]
    done = empty.doctor(*words, f"output={tmp_path}")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["ok"] is False
    found = {entry["name"]: entry for entry in report["findings"]}
    assert found["nemo.core"]["found"] == "ModuleNotFoundError: No module named 'nemo'"
    assert found["configuration"]["state"] == "failed"
    assert found["CUDA devices"]["state"] == "failed"


def test_missing_requirements_are_printed_for_pip(empty: CleanEnvironment) -> None:
    done = empty.doctor("--missing")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [entry.line for entry in declared()[1] if entry.needed]


def test_the_versions_of_the_container_are_in_range(tmp_path: Path) -> None:
    environment = CleanEnvironment(tmp_path / "venv")
    lend(environment, "packaging")
    for name, version in CONTAINER.items():
        environment.declare(name, version)
    done = environment.doctor("--json")
    assert {states(done)[canonicalize_name(name)] for name in CONTAINER} == {"ok"}
    missing = {canonicalize_name(Parsed(line).name) for line in environment.doctor("--missing").stdout.splitlines()}
    assert missing
    assert not missing & set(map(canonicalize_name, CONTAINER))


def test_a_version_outside_its_range_is_an_error_under_strict(tmp_path: Path) -> None:
    environment = CleanEnvironment(tmp_path / "venv")
    lend(environment, "packaging")
    for entry in declared()[1]:
        if entry.needed and entry.name != "packaging":
            old = {"megatron-core": "0.15.3", "megatron-bridge": "0.3.0"}
            environment.declare(entry.name, old.get(entry.name, "2.9.1"))
    environment.declare("transformer-engine", "1.13")
    done = environment.doctor("--json")
    found = states(done)
    for name in ("megatron-core", "megatron-bridge", "transformer-engine"):
        assert found[name] == "outside", name
    assert found["torch"] == "ok"
    assert done.returncode == 0
    done = environment.doctor("--strict")
    assert done.returncode == 1
    assert "outside the declared range: " in done.stdout.splitlines()[-1]


def test_without_packaging_versions_are_listed_and_not_judged(tmp_path: Path) -> None:
    environment = CleanEnvironment(tmp_path / "venv")
    environment.declare("megatron_core", "0.1")
    found = states(environment.doctor("--json"))
    assert found["megatron-core"] == "ok"
    assert found["packaging"] == "missing"
