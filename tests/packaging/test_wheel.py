"""The sdist and the wheel: their content, and that the wheel works in a fresh environment with its dependencies."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.doctor.clean import ROOT, CleanEnvironment, lend

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BUILD = "import setuptools.build_meta as b; print(b.{hook}({place!r}))"


def tracked(*patterns: str) -> list[str]:
    """The files of the repository below `patterns`."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy of the tracked files: nothing that lies around is in it."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    return built(source, "build_sdist", place)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, as pip builds it."""
    source, place = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (tree,) = source.iterdir()
    return built(tree, "build_wheel", place)


def built(source: Path, hook: str, place: Path) -> Path:
    """The files that a hook of the build backend writes to `place`."""
    code = BUILD.format(hook=hook, place=str(place))
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    (file,) = place.iterdir()
    return file


def test_the_sdist_has_package_recipes_documents_jobs_and_pins(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(tracked("nemo_popsd", "conf", "docs", "slurm", "requirements", "README.md", "LICENSE")) - names
    assert missing <= {"nemo_popsd/recipes"}, "a directory there"
    assert {f"nemo_popsd/recipes/{Path(name).name}" for name in tracked("conf")} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/")) or "__pycache__" in name]


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for recipe in tracked("conf"):
            assert archive.read(f"nemo_popsd/recipes/{Path(recipe).name}") == (ROOT / recipe).read_bytes()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert set(tracked("nemo_popsd")) - names == {"nemo_popsd/recipes"}
    assert "Project-URL: Paper, https://arxiv.org/abs/2607.02234" in metadata
    assert "Requires-Python: >=3.11" in metadata


def closure(requirements: list[str]) -> list[str]:
    """The installed distributions that pip would install for `requirements`, with all that they require."""
    wanted: dict[str, set[str]] = {}
    queue = [(Requirement(line), frozenset({""})) for line in requirements]
    while queue:
        requirement, extras = queue.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        chosen = frozenset({"", *requirement.extras})
        if chosen <= wanted.get(name, set()):
            continue
        wanted.setdefault(name, set()).update(chosen)
        try:
            declared = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # CUDA libraries of torch, which the CPU build lacks
        queue += [(Requirement(line), chosen) for line in declared]
    return sorted(name for name in wanted if any(importlib.metadata.distributions(name=name)))


def test_the_wheel_runs_with_what_it_declares_and_names_what_it_does_not(wheel: Path, tmp_path: Path) -> None:
    """The declared distributions are those of this environment, linked into a fresh one, and no others."""
    environment = CleanEnvironment(tmp_path / "venv")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(environment.site_packages)
    (own,) = importlib.metadata.distributions(name="nemo_popsd", path=[str(environment.site_packages)])
    lend(environment, *closure(own.requires or []))
    assert not (environment.site_packages / "pytest").exists()
    popsd = ("-m", "nemo_popsd")
    conf = tmp_path / "tiny.yaml"
    for words in (["init", "tiny", str(tmp_path)], ["config", str(conf)], ["plan", str(conf), "nodes=1"]):
        done = environment.run(*popsd, *words)
        assert done.returncode == 0, done.stderr
    train = ["train", str(conf), f"output={tmp_path / 'run'}", "training.steps=2", "training.prompts_per_step=2"]
    train += ["rollout.max_response_tokens=8", "data.validation.path=", "diagnosis.in_training=false"]
    refused = environment.run(*popsd, *train)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert line.startswith("popsd: error: installation: got no package megatron.bridge; need megatron-bridge")
    assert f"install it: {environment.python} -m pip install --no-deps 'megatron-bridge" in line
    lend(environment, "megatron-bridge")
    done = environment.run(*popsd, *train, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "huggingface" / "config.json").is_file()
