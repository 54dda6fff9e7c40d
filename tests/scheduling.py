"""How the tests are divided: which are quick, and which of them one worker of pytest-xdist runs together.

The tests of `make quick` are not listed anywhere. A test is quick unless it is marked slow, or it, one of its fixtures
or a module of `tests` that they import can start a process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest

_STARTERS = {"subprocess", "multiprocessing", "tests.harness", "tests.command_runner"}
"""Modules with functions that start processes."""
_SLURM = "tests/slurm/"
_SECONDS = 4.0
"""Typical time of a slow test; ``@pytest.mark.slow(seconds=...)`` gives that of one that takes much longer."""


def is_quick(item: pytest.Item) -> bool:
    """Whether a test belongs to `make quick`."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("slow") is not None:
        return False
    definitions = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(definition.func for several in definitions for definition in several)]
    return not any(_starts_processes(name) for name in _modules_of_tests(functions))


@functools.cache
def _starts_processes(name: str) -> bool:
    """Whether a module of the tests, or one that it imports, can start a process."""
    seen, pending = {name}, [name]
    while pending:
        values = list(vars(sys.modules[pending.pop()]).values())
        if not _STARTERS.isdisjoint(map(_module, values)):
            return True
        imported = _modules_of_tests(values) - seen
        seen |= imported
        pending += imported
    return False


def _modules_of_tests(values: Iterable[Any]) -> set[str]:
    return {name for name in map(_module, values) if name.startswith("tests.") and name in sys.modules}


def _module(value: Any) -> str:
    """Name of a module, or of the one that defines a function or class."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", "")) if callable(value) else ""


def group(nodeid: str) -> str:
    """Name of the tests that one worker runs together: those of a file, or all that share a Slurm."""
    return _SLURM if nodeid.startswith(_SLURM) else nodeid.partition("::")[0]


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the groups by the time that they take, so that no worker starts a long one at the end.

    The tests with a Slurm come first: they wait for most of their time.
    """
    seconds: dict[str, float] = {}
    for item in items:
        slow = item.get_closest_marker("slow")
        name = group(item.nodeid)
        seconds[name] = seconds.get(name, 0.0) + (slow.kwargs.get("seconds", _SECONDS) if slow else 0.2)
    items.sort(key=lambda item: (group(item.nodeid) != _SLURM, -seconds[group(item.nodeid)], group(item.nodeid)))
