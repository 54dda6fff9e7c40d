"""Present so that the repository root is on the path (through `tests/__init__.py`) whichever test is collected; marks
the quick tests and gives each worker of pytest-xdist tests that belong together."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest

from tests.layers import layers  # noqa: F401  (a fixture)
from tests.scheduling import group, is_quick, longest_first

# Workers share the cores: the time of one example says nothing. pytest-timeout bounds each test.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item):
            item.add_marker("quick")
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
