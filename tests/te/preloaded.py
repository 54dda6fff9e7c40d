"""Imports of a server of `tests.fork_servers` for ranks with Transformer Engine's layers."""

from __future__ import annotations

from tests.silence import silence
from tests.te.install import install
from tests.te.location import available

if available():
    with silence():
        install()

import tests.preloaded  # noqa: F401
