"""Runs `popsd` commands, each in a separate process forked from one that has imported all packages."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.fork_servers import CONTEXT, LOCAL, die_with_parent, forked_by

HANGS = None
"""Result of `run_command` for a command that did not end in time."""


def run_command(
    argv: list[str],
    log: Path,
    *,
    timeout: float,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
) -> int | None:
    """Runs ``popsd *argv`` and returns its exit status (1 for a traceback), or `HANGS`.

    Args:
        argv: arguments.
        log: file for the output.
        timeout: seconds after which the command is killed.
        environment: variables to set in addition to the caller's.
        directory: working directory; None uses that of the first command.
    """
    variables = {**os.environ, **(environment or {})}
    process: Any = CONTEXT.Process(target=_main, args=(argv, str(log), variables, directory))
    with forked_by(LOCAL):
        process.start()
    process.join(timeout)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return HANGS
    return int(process.exitcode)


def _main(argv: list[str], log: str, environment: dict[str, str], directory: Path | None) -> None:
    os.setsid()
    if directory is not None:
        os.chdir(directory)
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    become_command(argv, Path(log))


def become_command(argv: Sequence[str], log: Path, *, append: bool = False) -> NoReturn:
    """In a forked process: runs ``popsd *argv`` with output to `log`, exits with its status (1 for a traceback)."""
    status = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | (os.O_APPEND if append else os.O_TRUNC), 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        import torch

        from nemo_popsd.cli.main import main

        torch.set_num_threads(1)
        status = main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
