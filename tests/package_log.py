"""The package's logger between tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def package_log_is_restored() -> Iterator[None]:
    """A test that sets up the console leaves the package's logger as it was, so that `caplog` of a later test gets each
    record once.
    """
    log = logging.getLogger("nemo_popsd")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
