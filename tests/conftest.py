"""Puts the repository root on the path (through `tests/__init__.py`) for every collected test, marks the quick tests,
and assigns related tests to the same worker of pytest-xdist.
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests import fork_servers
from tests.isolation import environment_is_restored, package_log_is_restored  # noqa: F401  (fixtures)
from tests.layers import layers  # noqa: F401  (a fixture)
from tests.scheduling import group, has_no_quick_tests, is_quick, longest_first
from tests.te.location import available


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disables the garbage collector during collection, then freezes all objects, so that it never visits them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_OWNER = pytest.StashKey[str]()
"""Address at which workers reach the fork servers of this process."""


def pytest_configure(config: pytest.Config) -> None:
    if owner := getattr(config, "workerinput", {}).get("fork_servers"):
        fork_servers.use_shared(owner)
    if _quick_alone(config):  # no quick test has random examples
        return
    import hypothesis

    # Workers share the cores, so the time of one example is not meaningful. pytest-timeout limits each test.
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    if _quick_alone(config):  # no quick test needs the imports of a server
        return
    config.stash[_OWNER] = fork_servers.share()
    for spec in specs:
        words = [sys.executable, str(Path(__file__).with_name("forked_worker.py")), config.stash[_OWNER]]
        spec.python = shlex.join(words)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    if owner := node.config.stash.get(_OWNER, None):
        node.workerinput["fork_servers"] = owner


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
