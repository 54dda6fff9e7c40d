"""From a checked command to the work: the heavy imports happen here and nowhere earlier."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from nemo_popsd.cli.failures import as_lost_peer
from nemo_popsd.errors import START_AGAIN, TransientError, UserError, describe_error, is_transient
from nemo_popsd.parallel.launcher import check_rendezvous, read_launch


def run_entry(name: str, *args: Any, module: str = "entry", **options: Any) -> int:
    """Call ``nemo_popsd.commands.<module>.<name>(*args, **options)``, with a console that shows our own lines.

    Returns the exit status.

    A traceback is left for torchrun, which prints the one of the rank that failed first when all have ended.

    Raises:
        UserError, TransientError: from the entry, or in place of what a library says where a peer or a file system
            failed.
    """
    from nemo_popsd.observability.console import set_up_console

    if not _connected():
        check_rendezvous(read_launch())
    set_up_console()
    entry = importlib.import_module(f"nemo_popsd.commands.{module}")
    set_up_console()
    try:
        return int(getattr(entry, name)(*args, **options) or 0)
    except (UserError, TransientError):
        raise
    except Exception as error:
        lost = as_lost_peer(error, command=name, config=args[0] if args else None)
        if lost is not None:
            raise lost from error
        if isinstance(error, OSError) and is_transient(error):
            raise TransientError(name, got=describe_error(error), fix=START_AGAIN) from error
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        raise


def _connected() -> bool:
    """Whether this process has met the others already, as one that runs several commands has."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
