"""From a checked command to the work: the heavy imports happen here and nowhere earlier."""

from __future__ import annotations

import importlib

from nemo_popsd.errors import TransientError, UserError


def run_entry(name: str, *args: object, module: str = "entry", **options: object) -> int:
    """Call ``nemo_popsd.model.<module>.<name>(*args, **options)``, with a console that shows our own lines.

    Returns the exit status.

    A traceback is left for torchrun, which prints the one of the rank that failed first when all have ended.
    """
    from nemo_popsd.observability.console import set_up_console

    set_up_console()
    entry = importlib.import_module(f"nemo_popsd.model.{module}")
    set_up_console()
    try:
        return int(getattr(entry, name)(*args, **options) or 0)
    except (UserError, TransientError):
        raise
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        raise
