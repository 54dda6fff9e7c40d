"""The layers of models in tests that run with both local and TE layers."""

from __future__ import annotations

import pytest

from tests.harness import LOCAL, TRANSFORMER_ENGINE

on_transformer_engine = pytest.mark.transformer_engine
"""Marks tests of Transformer Engine only. `tests/conftest.py` skips them if it is not installed."""
BOTH = [LOCAL, pytest.param(TRANSFORMER_ENGINE, marks=on_transformer_engine)]


@pytest.fixture(scope="module", params=BOTH)
def layers(request: pytest.FixtureRequest) -> str:
    """Local layers and TE layers in turn, for `run_ranks`."""
    return str(request.param)
