"""Present so that the repository root is on the path (through `tests/__init__.py`) whichever test is collected."""

from tests.layers import layers  # noqa: F401  (a fixture)
