"""Selection of quick tests, and groups of tests for one worker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scheduling import group, has_no_quick_tests, imports_long, longest_first, takes_long


@pytest.mark.parametrize(
    ("module", "long"),
    [
        ("tests.test_harness", True),  # imports subprocess and run_ranks
        ("tests.te.test_kernels", False),  # the emulated kernels need only torch
        ("tests.training.test_layouts", True),
        ("tests.model.test_strategy", True),  # a module that it imports, and one that this one imports, need NeMo
        ("tests.cli.test_damage", False),
        ("tests.report.test_browser", True),  # a helper starts the browser
        ("tests.settings.test_bounds", False),
        ("tests.report.test_markup", True),  # hypothesis
    ],
)
def test_modules_whose_tests_are_not_quick_are_recognised(module: str, long: bool) -> None:
    assert takes_long(module) == long
    assert has_no_quick_tests(Path(__file__).parents[1] / f"{module.replace('.', '/')}.py") == long


def _megatron() -> None:
    from megatron.core import parallel_state  # noqa: F401


def _model() -> None:
    def inner() -> None:
        from nemo_popsd.model.training import build_reader  # noqa: F401

    inner()


def _helper() -> None:
    _megatron()


def _light(config: Any) -> Any:
    from nemo_popsd.config.loading import load_config  # noqa: F401

    return config.megatron.ddp, _light


@pytest.mark.parametrize(("function", "long"), [(_megatron, True), (_model, True), (_helper, True), (_light, False)])
def test_imports_inside_functions_are_recognised(function: Any, long: bool) -> None:
    assert imports_long(function) == long


def test_a_test_without_processes_is_marked_quick(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("quick") is not None


@pytest.mark.slow
def test_a_slow_test_is_not_quick(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("quick") is None


def _item(nodeid: str, slow: pytest.MarkDecorator | None = None) -> Any:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: slow and slow.mark)


def test_files_stay_together_and_the_longest_starts_first() -> None:
    items = [
        _item("tests/a.py::one"),
        _item("tests/b.py::one", pytest.mark.slow(seconds=100)),
        _item("tests/c.py::one", pytest.mark.slow),
        _item("tests/a.py::two"),
        _item("tests/c.py::two"),
        _item("tests/slurm/d.py::one"),
        _item("tests/slurm/e.py::one", pytest.mark.slow),
    ]
    longest_first(items)
    order = ["slurm/d.py::one", "slurm/e.py::one", "b.py::one", "c.py::one", "c.py::two", "a.py::one", "a.py::two"]
    assert [item.nodeid for item in items] == [f"tests/{name}" for name in order]
    assert len({group(item.nodeid) for item in items}) == 4
