"""Divides the tests: determines the quick ones, and the groups that one worker of pytest-xdist runs together.

The tests of `make quick` are determined by their imports. A test is quick unless it is marked slow, or one of the
following holds for a module of `tests` that defines it or one of its fixtures, or for a module imported from there:

* it can start a process or tries random examples (`_LONG`; checked in modules of `tests`);
* it imports Megatron, NeMo, Lightning or Transformers' models, which takes longer than all quick tests together
  (`_HEAVY`; checked in all modules).

Imports at run time, in the test, its fixtures and the functions of `tests` that they call, count too. Imports are read
from the sources, so that `make quick` does not import files without quick tests.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

_LONG = {"subprocess", "multiprocessing", "hypothesis", "tests.harness", "tests.command_runner"}
_HEAVY = re.compile(r"(megatron|nemo|lightning)(\.|$)|transformers\.\w*(ForCausalLM|Model)$")
_OWN = {"tests", "nemo_popsd", "benchmarks", "experiments"}
"""Top-level packages of this repository."""
_ROOT = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(r"^(?:from (\S+) import (\([^)]*\)|[^\n]*)|import ([^\n]*))", re.MULTILINE)
"""Matches imports at module level; indented imports are inside functions or for type checkers."""
_SLURM = "tests/slurm/"
_SECONDS = 4.0
"""Typical time of a slow test; ``@pytest.mark.slow(seconds=...)`` states the time of tests that take much longer."""


def is_quick(item: pytest.Item) -> bool:
    """Whether a test belongs to `make quick`."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("slow") is not None:
        return False
    definitions = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(definition.func for several in definitions for definition in several)]
    names = {function.__module__ for function in functions}
    if any(takes_long(name) for name in names if name.startswith("tests.")):
        return False
    return not any(imports_long(inspect.unwrap(function)) for function in functions)


def has_no_quick_tests(file: Path) -> bool:
    """Whether no test of a file can be quick because of the imports of the file."""
    return file.suffix == ".py" and takes_long(".".join(file.relative_to(_ROOT).with_suffix("").parts))


@functools.cache
def takes_long(name: str) -> bool:
    """Whether a module of the tests, or one that it imports, uses one of `_LONG` or imports a module in `_HEAVY`."""
    if _HEAVY.match(name):
        return True
    seen, pending = {name}, [name]
    while pending:
        current = pending.pop()
        imported = _imports(current)
        if current.startswith("tests.") and not _LONG.isdisjoint(imported):
            return True
        if any(map(_HEAVY.match, imported)):
            return True
        new = {module for module in imported if module.partition(".")[0] in _OWN} - seen
        seen |= new
        pending += new
    return False


@functools.cache
def imports_long(function: Callable[..., Any]) -> bool:
    """Whether a function, or a function of `tests` that it calls, imports a module that `takes_long` at run time.

    In its code, names with a dot are imported modules.
    """
    seen, pending = {function}, [function]
    while pending:
        current = pending.pop()
        if not isinstance(current, FunctionType):
            continue
        for name in _names(current.__code__):
            if "." in name and takes_long(name):
                return True
            called = current.__globals__.get(name)
            if isinstance(called, FunctionType) and called.__module__.startswith("tests.") and called not in seen:
                seen.add(called)
                pending.append(called)
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@functools.cache
def _imports(name: str) -> frozenset[str]:
    """Modules and objects that the module `name` imports, with the packages that contain it."""
    file = _file(name)
    if file is None:
        return frozenset()
    parents = {name[: match.start()] for match in re.finditer(r"\.", name)}
    return frozenset({*_imported(file.read_text()), *parents})


def _imported(source: str) -> Iterator[str]:
    for package, names, modules in _IMPORT.findall(source):
        for text in re.sub(r"#[^\n]*|[()]", "", names or modules).split(","):
            imported = text.split(" as ")[0].strip()
            if not package:
                yield imported
            elif imported:
                yield from (package, f"{package}.{imported}")


@functools.cache
def _file(name: str) -> Path | None:
    """The file of a module or package of this repository."""
    if name.partition(".")[0] not in _OWN:
        return None
    place = _ROOT.joinpath(*name.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def group(nodeid: str) -> str:
    """Name of the group of tests that one worker runs: the tests of a file, or all tests that share a Slurm."""
    return _SLURM if nodeid.startswith(_SLURM) else nodeid.partition("::")[0]


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts the groups by decreasing time, so that no worker starts a long group at the end.

    Tests with a Slurm come first, since they mostly wait.
    """
    seconds: dict[str, float] = {}
    for item in items:
        slow = item.get_closest_marker("slow")
        name = group(item.nodeid)
        seconds[name] = seconds.get(name, 0.0) + (slow.kwargs.get("seconds", _SECONDS) if slow else 0.2)
    items.sort(key=lambda item: (group(item.nodeid) != _SLURM, -seconds[group(item.nodeid)], group(item.nodeid)))
