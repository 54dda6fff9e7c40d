"""One thread for all tests of this room."""

from tests.threads import one_thread  # noqa: F401 a fixture
