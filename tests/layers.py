"""The layers of a test's models, for tests that run with local and with TE layers."""

from __future__ import annotations

import pytest

from tests.harness import LOCAL, TRANSFORMER_ENGINE
from tests.te.install import available

_INSTALLED = pytest.mark.skipif(not available(), reason="needs Transformer Engine's Python modules: make te-env")
BOTH = [LOCAL, pytest.param(TRANSFORMER_ENGINE, marks=[_INSTALLED, pytest.mark.transformer_engine])]
on_transformer_engine = _INSTALLED
"""Marks tests that are about Transformer Engine alone."""


@pytest.fixture(scope="module", params=BOTH)
def layers(request: pytest.FixtureRequest) -> str:
    """Local layers and TE layers in turn, for `run_ranks`."""
    return str(request.param)
