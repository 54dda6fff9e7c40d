"""Checks of the Dockerfile without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.compat.stacks import STACKS

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """The path of a linter that pip installed."""
    path = Path(sys.executable).parent / name
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (requirements/26.02/dev.txt)")
    return found


def instructions() -> list[tuple[str, str]]:
    """Name and argument of every instruction, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_container_is_an_argument_and_the_newest_that_is_supported_by_default() -> None:
    first, second = instructions()[:2]
    assert first == ("ARG", f"NEMO_TAG={STACKS[-1].container}")
    assert second == ("FROM", "nvcr.io/nvidia/nemo:${NEMO_TAG}")


def test_it_does_not_run_as_root_and_has_a_health_check() -> None:
    found = instructions()
    users = [argument for name, argument in found if name == "USER"]
    assert users == ["${USER_ID}"]
    assert ("ARG", "USER_ID=1000") in found
    (health,) = [argument for name, argument in found if name == "HEALTHCHECK"]
    assert health.endswith('CMD ["popsd", "doctor"]')


def test_only_the_script_installs_packages_and_they_are_examined() -> None:
    runs = [argument for name, argument in instructions() if name == "RUN"]
    assert not any("pip install" in run for run in runs)
    assert "docker/install.sh . && python -m nemo_popsd doctor --imports --strict" in runs[0]


def test_what_is_copied_exists() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"pyproject.toml", "README.md", "LICENSE", "nemo_popsd", "conf", "docker"} <= set(kept)
