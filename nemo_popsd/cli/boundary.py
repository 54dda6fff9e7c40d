"""Errors that any sub-command may raise: a package that is not installed, an output that is closed early."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec

from nemo_popsd.errors import UserError

P = ParamSpec("P")

OUTPUT_CLOSED = 141
"""Exit status of a command whose output is a closed pipe, the same as a shell's for SIGPIPE."""

# Distributions whose name differs from the module's. For other modules the top-level name is used.
_DISTRIBUTIONS = {
    "megatron.bridge": "megatron-bridge",
    "megatron.core": "megatron-core",
    "megatron": "megatron-core",
    "nemo": "nemo-toolkit",
    "math_verify": "math-verify",
    "transformer_engine": "transformer-engine",
    "mlflow": "mlflow-skinny",
    "yaml": "pyyaml",
}
_WITHOUT_DEPENDENCIES = ("megatron-bridge",)
"""Their metadata requires packages that have no builds for CPUs (see Makefile)."""


@contextmanager
def missing_packages_named() -> Iterator[None]:
    """Turns the failed import of a package into an error that names the command to install it.

    Raises:
        UserError: in place of `ModuleNotFoundError`, unless the module belongs to this package, which is a defect.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = _missing(error.name or "")
        if missing is None:
            raise
        raise missing from error


def _missing(module: str) -> UserError | None:
    from nemo_popsd.doctor.packages import declared

    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    wanted = next((_DISTRIBUTIONS[name] for name in names if name in _DISTRIBUTIONS), parts[0].replace("_", "-"))
    if parts[0] == "nemo_popsd":
        return None
    line = {entry.name: entry.line for entry in declared()[1]}.get(wanted, wanted)
    option = "--no-deps " if wanted in _WITHOUT_DEPENDENCIES else ""
    return UserError(
        "installation",
        got=f"no package {module}",
        need=line,
        fix=f"install it: {sys.executable} -m pip install {option}'{line}' (`popsd doctor` shows everything missing)",
    )


def quiet_when_output_closes(command: Callable[P, int]) -> Callable[P, int]:
    """Ends `command` without a traceback when its standard output is closed early, as in ``popsd doctor | head``."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            status = command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _redirect_closed_output():
                raise  # a pipe other than standard output
            return OUTPUT_CLOSED
        except SystemExit:  # from the parser, after --help
            _redirect_closed_output()
            raise
        return status

    return run


def _redirect_closed_output() -> bool:
    """Whether standard output has been closed; it then goes to /dev/null, so that Python's flush at exit succeeds."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # replaced by an object that is not a file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return True
