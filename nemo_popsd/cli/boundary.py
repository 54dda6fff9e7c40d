"""Errors common to all sub-commands: a missing package, an output that is closed early."""

from __future__ import annotations

import functools
import importlib.util
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import ParamSpec

from nemo_popsd.errors import UserError

P = ParamSpec("P")

OUTPUT_CLOSED = 141
"""Exit status of a command whose output is a closed pipe; a shell uses the same for SIGPIPE."""

# Distributions whose names differ from their modules. For other modules, the top-level name is used.
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
_OF_A_MODEL = ("megatron.bridge", "megatron.core", "nemo", "lightning", "transformers", "torch")
"""Modules that every command with a model imports. pip does not install the first one with this package."""
_WITHOUT_DEPENDENCIES = ("megatron-bridge",)
"""Distributions to install without dependencies: their metadata requires packages without CPU builds (see Makefile)."""


@contextmanager
def missing_packages_named() -> Iterator[None]:
    """Turn the failed import of a package into an error with the command that installs it.

    Raises:
        UserError: instead of `ModuleNotFoundError`, unless the module belongs to this package, which is a defect.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = error.name or ""
        if module.split(".")[0] == "nemo_popsd":
            raise
        raise _missing([module]) from error


def refuse_missing_packages() -> None:
    """Refuse a command that builds a model if required packages are not installed, without importing them.

    Raises:
        UserError: packages are missing; the message names all of them and the command that installs them.
    """
    missing = [module for module in _OF_A_MODEL if not _is_found(module)]
    if missing:
        raise _missing(missing)


def _is_found(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _missing(modules: Sequence[str]) -> UserError:
    from nemo_popsd.doctor.packages import declared

    lines = {entry.name: entry.line for entry in declared()[1]}
    wanted = {name: lines.get(name, name) for name in map(_distribution, modules)}
    commands = []
    for option, chosen in (
        ("", [name for name in wanted if name not in _WITHOUT_DEPENDENCIES]),
        (_without_dependencies(), [name for name in wanted if name in _WITHOUT_DEPENDENCIES]),
    ):
        if chosen:
            quoted = " ".join(f"'{wanted[name]}'" for name in chosen)
            commands.append(f"{sys.executable} -m pip install {option}{quoted}")
    several = len(modules) > 1
    return UserError(
        "installation",
        got=f"no package{'s' if several else ''} {', '.join(modules)}",
        need=" and ".join(wanted.values()),
        fix=f"install {'them' if several else 'it'}: {' && '.join(commands)} (`popsd doctor` shows everything missing)",
    )


def _without_dependencies() -> str:
    """Return pip's options for `_WITHOUT_DEPENDENCIES`.

    The metadata of Megatron-Bridge 0.6 excludes Python 3.13; without the option, pip would install 0.3 there, which
    belongs to another stack.
    """
    return "--no-deps " + ("--ignore-requires-python " if sys.version_info >= (3, 13) else "")


def _distribution(module: str) -> str:
    """Return the distribution that provides `module`."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((_DISTRIBUTIONS[name] for name in names if name in _DISTRIBUTIONS), parts[0].replace("_", "-"))


def quiet_when_output_closes(command: Callable[P, int]) -> Callable[P, int]:
    """End `command` without a traceback if its standard output is closed early, as in ``popsd doctor | head``."""

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
    """Whether standard output was closed; if so, redirect it to /dev/null, so that Python's flush at exit succeeds."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    if not output_is_closed():
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def output_is_closed() -> bool:
    """Whether standard output is a pipe without a reader."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # replaced by an object that is not a file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
