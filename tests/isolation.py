"""Restores process-wide state that a test may change: the package's logger and the environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def package_log_is_restored() -> Iterator[None]:
    """Restores the package's logger after a test that sets up the console, so that `caplog` of a later test receives
    each record once.
    """
    log = logging.getLogger("nemo_popsd")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def environment_is_restored() -> Iterator[None]:
    """Restores the environment after a module: Megatron sets variables of Transformer Engine when it builds a model,
    and ranks of later tests inherit the environment.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
