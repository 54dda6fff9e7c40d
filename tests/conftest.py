"""Present so that the repository root is on the path (through `tests/__init__.py`) whichever test is collected; marks
the quick tests and gives each worker of pytest-xdist tests that belong together."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.isolation import environment_is_restored, package_log_is_restored  # noqa: F401  (fixtures)
from tests.layers import layers  # noqa: F401  (a fixture)
from tests.scheduling import group, has_no_quick_tests, is_quick, longest_first
from tests.te.location import available


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the garbage collector visits it neither now nor during the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    if _quick_alone(config):  # no quick test has random examples
        return
    import hypothesis

    # Workers share the cores: the time of one example says nothing. pytest-timeout bounds each test.
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return (_quick_alone(config) and collection_path.is_file() and has_no_quick_tests(collection_path)) or None


def _quick_alone(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "quick")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs_transformer_engine = pytest.mark.skipif(
        not available(), reason="needs Transformer Engine's Python modules: make te-env"
    )
    for item in items:
        if is_quick(item):
            item.add_marker("quick")
        if item.get_closest_marker("transformer_engine") is not None:
            item.add_marker(needs_transformer_engine)
    if hasattr(config, "workerinput"):
        longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # keeps the order of `longest_first`
    return Groups(config, log)
