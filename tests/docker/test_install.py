"""docker/install.sh in an environment whose packages are known: installed versions stay, missing packages are added.

Distributions with the names and versions of the container replace it; wheels made here replace PyPI, including newer
versions of packages that must not change.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_popsd.doctor.packages import declared
from tests.doctor.clean import ROOT, CleanEnvironment, lend, states
from tests.doctor.test_packages import CONTAINER

pytestmark = pytest.mark.slow

ABSENT = {"accelerate", "math-verify", "rich", "tqdm"}


def write_wheel(place: Path, name: str, version: str, *requires: str) -> None:
    """A wheel with metadata only."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the files that .dockerignore admits."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nemo_popsd", source / "nemo_popsd", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", output, source]
    subprocess.run([sys.executable, "-m", *words], check=True)
    (wheel,) = output.glob("nemo_popsd-*.whl")
    return wheel


@pytest.fixture
def container(tmp_path: Path) -> CleanEnvironment:
    environment = CleanEnvironment(tmp_path / "venv", with_pip=True)
    lend(environment, "packaging")
    for name, version in {**CONTAINER, "numpy": "1.26.4"}.items():
        environment.declare(name, version)
    there = {name.lower().replace("_", "-") for name in CONTAINER} | ABSENT | {"packaging"}
    others = {"transformers": "4.57.1", "omegaconf": "2.3.0", "pyyaml": "6.0.2"}
    for entry in declared()[1]:
        if entry.needed and entry.name not in there:
            environment.declare(entry.name, others.get(entry.name, "4.0"))
    return environment


@pytest.fixture
def container_without_nemo(tmp_path: Path) -> CleanEnvironment:
    """Versions of the stack 26.08, with the hydra-core that Megatron-Bridge 0.6.2 asks for."""
    environment = CleanEnvironment(tmp_path / "venv", with_pip=True)
    lend(environment, "packaging")
    newer = {
        "torch": "2.13.0", "transformer_engine": "2.20.2", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2",
        "transformers": "5.12.1", "hydra-core": "1.3.8", "omegaconf": "2.3.0", "pyyaml": "6.0.2",
    }  # fmt: skip
    for name, version in newer.items():
        environment.declare(name, version)
    declared_already = {*newer, "transformer-engine", "nemo-toolkit", "lightning", "math-verify", "packaging"}
    for entry in declared()[1]:
        if entry.needed and entry.name not in declared_already:
            environment.declare(entry.name, "4.0")
    environment.declare("math-verify", "0.9.0")
    return environment


@pytest.fixture
def index(tmp_path: Path) -> Path:
    place = tmp_path / "index"
    place.mkdir()
    for name, version in (("torch", "2.13.0"), ("numpy", "2.4.6"), ("megatron_core", "0.16.1"), ("rich", "15.0.0")):
        write_wheel(place, name, version)
    write_wheel(place, "tqdm", "4.70.1")
    write_wheel(place, "math_verify", "0.9.0")
    return place


def install(environment: CleanEnvironment, index: Path, project: Path) -> subprocess.CompletedProcess[str]:
    return environment.run(
        "-c",
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)",
        str(ROOT / "docker" / "install.sh"),
        str(project),
        str(environment.python),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(index),
    )


def versions(environment: CleanEnvironment) -> dict[str, str]:
    listed = environment.run("-m", "pip", "--disable-pip-version-check", "list", "--format=freeze").stdout.split()
    return dict(line.split("==") for line in listed)


def test_missing_packages_are_added_and_no_version_changes(
    container: CleanEnvironment, index: Path, project: Path
) -> None:
    container.declare("odd", "1.0-vendor")  # a vendor's version, which pip's rules do not allow
    before = versions(container)
    # A package that conflicts with an installed version is refused.
    write_wheel(index, "accelerate", "1.15.0", "torch>=2.11", "numpy>=2")
    done = install(container, index, project)
    assert done.returncode != 0
    assert "conflict" in done.stdout + done.stderr
    after = versions(container)
    assert after == {**before, "nemo_popsd": after["nemo_popsd"]}

    (index / "accelerate-1.15.0-py3-none-any.whl").unlink()
    write_wheel(index, "accelerate", "1.15.0", "torch>=2.0.0", "numpy>=1.17,<3", "psutil")
    write_wheel(index, "psutil", "7.2.2")
    done = install(container, index, project)
    assert done.returncode == 0, done.stdout + done.stderr
    added = {"accelerate": "1.15.0", "math_verify": "0.9.0", "psutil": "7.2.2", "rich": "15.0.0", "tqdm": "4.70.1"}
    assert versions(container) == {**after, **added}
    found = states(container.run("-m", "nemo_popsd", "doctor", "--json"))
    assert not {name for name, state in found.items() if state in ("missing", "outside")}


def test_the_core_of_nemo_is_added_to_a_container_without_it(
    container_without_nemo: CleanEnvironment, index: Path, project: Path
) -> None:
    extra = 'hydra-core<=1.3.2; extra == "common"'  # with its requirements, pip would refuse to install it
    write_wheel(index, "nemo_toolkit", "3.0.0", extra, "Provides-Extra: common")
    before = versions(container_without_nemo)
    needed = {line.split(">")[0] for line in (ROOT / "docker" / "nemo-core.txt").read_text().splitlines()}
    for name in sorted(name for name in needed if name and name[0] != "#" and name not in before):
        write_wheel(index, name.replace("-", "_"), "2.4.0")
    done = install(container_without_nemo, index, project)
    assert done.returncode == 0, done.stdout + done.stderr
    after = versions(container_without_nemo)
    assert {name: version for name, version in after.items() if name in before} == before
    assert {"nemo_toolkit", "lightning", "webdataset"} <= {name.replace("-", "_") for name in after}
    done = container_without_nemo.run("-m", "nemo_popsd", "doctor", "--json")
    assert {name for name, state in states(done).items() if state in ("missing", "outside")} <= {"stack"}
    [stack] = [entry for entry in json.loads(done.stdout)["findings"] if entry["name"] == "stack"]
    if stack["state"] == "outside":  # the tests run with the Python of the other container
        assert stack["found"].startswith("python 3.11")
        assert ";" not in stack["found"]
        assert "26.08" in stack["need"]
    else:
        assert (stack["state"], stack["found"]) == ("ok", "26.08")
