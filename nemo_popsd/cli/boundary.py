"""What may go wrong around any sub-command: a package that is not installed, an output that nobody reads."""

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

NOBODY_READS = 141
"""Exit status of a command whose output went into a pipe that was closed, as a shell gives it for SIGPIPE."""

# By module, where it is not the name of the distribution. Of the others the top-level name is looked up.
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
"""Their metadata asks for packages that have no builds for CPUs (see Makefile)."""


@contextmanager
def missing_packages_named() -> Iterator[None]:
    """Turns the failed import of a package into one line that says how to install it.

    Raises:
        UserError: in place of `ModuleNotFoundError`, but for a module of our own, which is a defect.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        told = _how_to_install(error.name or "")
        if told is None:
            raise
        raise told from error


def _how_to_install(module: str) -> UserError | None:
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


def quiet_when_nobody_reads(command: Callable[P, int]) -> Callable[P, int]:
    """Ends `command` without a traceback when its standard output is closed early, as in ``popsd doctor | head``."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            status = command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _lead_closed_output_nowhere():
                raise  # another pipe than ours
            return NOBODY_READS
        except SystemExit:  # from the parser, after --help
            _lead_closed_output_nowhere()
            raise
        return status

    return run


def _lead_closed_output_nowhere() -> bool:
    """Whether nobody reads standard output any more; Python's own flush at the end must not fail then."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # replaced by an object that is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return True
