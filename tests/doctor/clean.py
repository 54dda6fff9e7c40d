"""Virtual environments that contain only the distributions that a test declares."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


class CleanEnvironment:
    """A virtual environment without packages, in which distributions can be declared by their metadata only."""

    def __init__(self, directory: Path, *, with_pip: bool = False, interpreter: str | None = None) -> None:
        if interpreter is None:
            venv.create(directory, with_pip=with_pip, symlinks=True)
        else:
            subprocess.run([interpreter, "-m", "venv", "--without-pip", str(directory)], check=True)
        self.python = directory / "bin" / "python"
        (self.site_packages,) = directory.glob("lib/python*/site-packages")

    def declare(self, name: str, version: str, *requires: str) -> None:
        """Installs the metadata of `name`, without a module to import."""
        info = self.site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`python words...`, outside the source tree and without the caller's settings of Python and pip."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
        }
        return subprocess.run(
            [str(self.python), *words],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.site_packages,
            env={**kept, **variables},
        )

    def doctor(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`popsd doctor` from the source tree."""
        return self.run("-m", "nemo_popsd", "doctor", *words, PYTHONPATH=str(ROOT))


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The state of each finding by name, from the output of `doctor --json`."""
    return {entry["name"]: entry["state"] for entry in json.loads(done.stdout)["findings"]}


def lend(environment: CleanEnvironment, *names: str) -> None:
    """Makes packages of the environment that runs the tests importable in `environment`, with their metadata.

    A folder without `__init__.py`, which several distributions may share, becomes a folder there; others become links.
    """
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            if ".." in file.parts or file.is_absolute():
                continue
            source, target = Path(str(distribution.locate_file(file.parts[0]))), environment.site_packages
            for part in file.parts[1:]:
                if source.name.endswith(".dist-info") or not source.is_dir() or (source / "__init__.py").exists():
                    break
                source = source / part
            target = target / source.relative_to(str(distribution.locate_file("")))
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
