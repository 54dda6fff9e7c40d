"""What the fork server of `tests.harness` imports for ranks that have the layers of a GPU."""

from __future__ import annotations

from tests.te.install import available, install

if available():
    install()

import tests.preloaded  # noqa: F401
