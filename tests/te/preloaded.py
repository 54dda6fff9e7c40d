"""What the fork server of `tests.harness` imports for ranks with Transformer Engine's layers."""

from __future__ import annotations

from tests.te.install import install
from tests.te.location import available

if available():
    install()

import tests.preloaded  # noqa: F401
