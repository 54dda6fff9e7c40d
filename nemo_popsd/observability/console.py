"""Terminal output: the package's messages from rank 0, without irrelevant output of libraries."""

from __future__ import annotations

import logging
import os
import sys

from nemo_popsd.errors import UserError
from nemo_popsd.observability.foreign import catch_foreign_output
from nemo_popsd.observability.rank import is_rank_zero

LEVEL = "POPSD_LOG_LEVEL"
"""Environment variable with the minimum level of messages on rank 0. `debug` includes messages of libraries."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def set_up_console() -> None:
    """Shows the package's log on rank 0 and suppresses irrelevant output of libraries.

    Call it before the import of Megatron and NeMo, which print at import, and again afterwards, since they configure
    their loggers at import.

    Raises:
        UserError: `POPSD_LOG_LEVEL` is not a level.
    """
    name = os.environ.get(LEVEL, "info").lower()
    if name not in _LEVELS:
        raise UserError("environment", got=f"{LEVEL}={name!r}", need=f"one of {', '.join(_LEVELS)}", fix=f"set {LEVEL}")
    log = logging.getLogger("nemo_popsd")
    log.setLevel(_LEVELS[name] if is_rank_zero() else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    catch_foreign_output()
