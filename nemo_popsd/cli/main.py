"""Entry point of `popsd`: parses the command line, runs a sub-command, and prints an error as one line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd import __version__
from nemo_popsd.cli import (
    convert,
    data,
    diagnose,
    doctor,
    evaluate,
    export,
    init,
    plan,
    rehearse,
    report,
    rollouts,
    show_config,
    train,
)
from nemo_popsd.cli.arguments import Parser, example
from nemo_popsd.cli.boundary import missing_packages_named, quiet_when_output_closes
from nemo_popsd.cli.failures import LostPeerError
from nemo_popsd.cli.last_line import print_after_torchrun
from nemo_popsd.errors import SAVED_AND_STOPPED, TransientError, UserError, user_or_transient
from nemo_popsd.parallel import launcher

_COMMANDS = (
    init,
    train,
    evaluate,
    diagnose,
    report,
    export,
    convert,
    data,
    plan,
    rehearse,
    rollouts,
    show_config,
    doctor,
)

USER_ERROR = 2
"""Exit status for an error that the user must fix."""
TRANSIENT = 1
"""Exit status for an error that a restart may fix; also Python's status for an uncaught exception."""

_GRACE_SECONDS = 3.0
"""How long other ranks wait, for rank 0 to print the error and torchrun to end them, before they print it."""
_KEPT_AT_CTRL_C = {
    "evaluate": "; the samples on disk are kept, and the same command generates the rest",
    "diagnose": "; nothing was written except complete answers of --views, which the same command reuses",
    "convert": "; OUT is complete or absent, and the same command starts again",
    "export": "; OUTPUT is unchanged or complete",
}
"""State of the output after Ctrl-C, by command. `train` has its own handlers: it saves, or reports that no step was in
progress."""
_EFFECT_SECONDS = 2.0
"""Added to the time of an error that another rank caused, because torchrun reports the earliest error (in seconds)."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `popsd` and all its sub-commands."""
    parser = Parser(
        prog="popsd",
        description="Purified On-Policy Self-Distillation on NVIDIA NeMo and Megatron-core.",
        epilog=example(
            "popsd init",
            "popsd init tiny",
            "popsd train conf/tiny.yaml training.steps=4",
            "torchrun --nproc-per-node 2 -m nemo_popsd train conf/tiny.yaml parallel.tensor=2",
        ),
    )
    parser.add_argument("--version", action="version", version=f"popsd {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; overrides may come before and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse fills a `*` argument once; overrides that follow an option are left over.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


@quiet_when_output_closes
def main(argv: Sequence[str] | None = None) -> int:
    """Run `popsd` and return the exit status. Exceptions that are not from `nemo_popsd.errors` propagate."""
    args = parse(argv)
    try:
        with missing_packages_named():
            status = int(args.run(args) or 0)
    except (UserError, TransientError) as error:
        reported = user_or_transient(error) if isinstance(error, UserError) else error
        _report(reported)
        status = USER_ERROR if isinstance(reported, UserError) else TRANSIENT
    except KeyboardInterrupt:
        if launcher.rank() == 0:
            kept = _KEPT_AT_CTRL_C.get(args.command, "")
            print(f"popsd {args.command}: stopped by Ctrl-C{kept}", file=sys.stderr, flush=True)
        status = 128 + signal.SIGINT
    if status == SAVED_AND_STOPPED:
        _leave_for_torchrun("popsd: saved and stopped after a signal; this is not a failure", time.time())
    _leave_hanging_trackers(status)
    return status


def _leave_hanging_trackers(status: int) -> None:
    """End the process without the exit handlers of libraries if a tracker hangs, because they would wait for it."""
    trackers = sys.modules.get("nemo_popsd.observability.trackers")
    if trackers is not None and trackers.any_hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _report(error: UserError | TransientError) -> None:
    """Print `error` once for all ranks that raised it.

    Rank 0 prints immediately and exits, and torchrun ends the others. A rank that is still running after the grace
    period was the only one with the error, so it prints it.
    """
    rank = launcher.rank()
    message = "popsd: error: " + " ".join(str(error).splitlines()) + (f" (rank {rank})" if rank else "")
    moment = time.time() + (_EFFECT_SECONDS if isinstance(error, LostPeerError) else 0.0)
    if rank != 0:
        time.sleep(_GRACE_SECONDS)
    _leave_for_torchrun("\n".join([message, *error.advice]), moment)
    print("\n".join([message, *error.advice]), file=sys.stderr, flush=True)


def _leave_for_torchrun(message: str, moment: float) -> None:
    """Write `message` to torchrun's error file; torchrun reports the earliest message of all ranks.

    The message is printed again after torchrun's report.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(moment))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
        print_after_torchrun(message)
