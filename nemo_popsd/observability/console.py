"""Output on the terminal: the package's own messages from rank 0, without what libraries print needlessly."""

from __future__ import annotations

import logging
import os
import sys

from nemo_popsd.errors import UserError
from nemo_popsd.observability.foreign import catch_foreign_output
from nemo_popsd.observability.rank import is_rank_zero

LEVEL = "POPSD_LOG_LEVEL"
"""Environment variable: the least level of the messages that rank 0 shows. `debug` includes those of libraries."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def set_up_console() -> None:
    """Shows the package's log on rank 0 and catches what libraries print needlessly.

    Call it before Megatron and NeMo are imported, since they print at import, and again afterwards, since they set up
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
