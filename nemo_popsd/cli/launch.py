"""Running a command after its arguments have been checked. Torch, Megatron and NeMo are imported only here."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec

from nemo_popsd.cli.boundary import output_is_closed, refuse_missing_packages
from nemo_popsd.cli.failures import as_lost_peer
from nemo_popsd.errors import START_AGAIN, TransientError, UserError, describe_error, is_transient
from nemo_popsd.parallel.launcher import check_rendezvous, read_launch

P = ParamSpec("P")


def run_command(load: Callable[[], Callable[P, int | None]], *args: P.args, **kwargs: P.kwargs) -> int:
    """Import a command and call it with `args` and `kwargs`, with the console set up for the package's messages.

    A traceback is recorded for torchrun, which prints the one of the rank that failed first after all ranks have ended.

    Args:
        load: imports the command and returns it. It is called after the console is set up, because libraries print at
            import.
        args: arguments of the command.
        kwargs: keyword arguments of the command.

    Returns:
        The exit status.

    Raises:
        UserError, TransientError: raised by the command, or instead of a library's error if a peer or a file system
            failed.
    """
    from nemo_popsd.observability.console import set_up_console

    refuse_missing_packages()
    if not _connected():
        check_rendezvous(read_launch())
    set_up_console()
    with _without_collections():
        command = load()
    set_up_console()  # again: libraries set up their loggers at import
    try:
        return int(command(*args, **kwargs) or 0)
    except (UserError, TransientError):
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            raise  # the output has no reader; `cli.boundary` ends the command
        lost = as_lost_peer(error, command=command.__name__, config=args[0] if args else None)
        if lost is not None:
            raise lost from error
        if isinstance(error, OSError) and is_transient(error):
            raise TransientError(command.__name__, got=describe_error(error), fix=START_AGAIN) from error
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        raise


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Disable garbage collection during the imports of a new process.

    Repeated collections over about a million objects would take a sixth of the import time. The imported objects are
    frozen, so later collections also skip them.
    """
    if "torch" in sys.modules:  # a process that runs several commands
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _connected() -> bool:
    """Whether the process group already exists, as in a process that runs several commands."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
