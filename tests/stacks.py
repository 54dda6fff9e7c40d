"""The stack of library versions with which a test runs, and the environment of the other stack.

`make venv` creates `.venv` (26.02), `make venv STACK=current` creates `.venv-26.08`. Tests that need both are skipped
if one is missing.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from nemo_popsd.compat.stacks import STACKS, closest

ROOT = Path(__file__).parents[1]
_ENVIRONMENTS = {"26.02.01": ".venv", "26.08": ".venv-26.08"}
"""Environment folder by the container of the stack."""


def installed() -> str:
    """The container whose versions are installed."""
    names = {name for stack in STACKS for name in stack.ranges} - {"python", "transformer-engine"}
    versions = {name: metadata.version(name) for name in names}
    return closest({"python": platform.python_version(), **versions}).container


def other_python() -> Path | None:
    """The interpreter with the versions of the other stack; None if its environment is missing or incomplete."""
    [folder] = [folder for container, folder in _ENVIRONMENTS.items() if container != installed()]
    complete = (ROOT / folder / ".runtime-installed").exists()
    return ROOT / folder / "bin" / "python" if complete else None
