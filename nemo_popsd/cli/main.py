"""Entry point of `popsd`: parses the command line, runs a sub-command, and tells user errors in one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from nemo_popsd import __version__
from nemo_popsd.cli import convert, diagnose, doctor, evaluate, export, plan, report, rollouts, show_config, train
from nemo_popsd.errors import UserError

_COMMANDS = (train, evaluate, diagnose, report, export, convert, plan, rollouts, show_config, doctor)

USER_ERROR = 2
"""Exit status for what the user can mend."""

_GRACE_SECONDS = 3.0
"""How long ranks other than 0 wait for rank 0 to tell the error (and torchrun to end them) before they tell it."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `popsd` and all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="popsd",
        description="Purified On-Policy Self-Distillation on NVIDIA NeMo and Megatron-core.",
        epilog="Several ranks: torchrun --nproc-per-node 2 -m nemo_popsd train CONF parallel.tensor=2",
    )
    parser.add_argument("--version", action="version", version=f"popsd {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; overrides may stand before and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse fills a `*` argument once; overrides that follow an option are left over.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)} (popsd {args.command} --help)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run `popsd`; returns the exit status. Exceptions other than `UserError` keep their traceback."""
    args = parse(argv)
    # OpenMP's threads spin while they wait; on a shared CPU that made a small model's decoding twenty times slower.
    # Read when torch is first imported, which no module does before a sub-command runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        _tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"popsd {args.command}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _tell(error: UserError) -> None:
    """Print `error` once for the ranks that met it alike.

    Rank 0 speaks at once and ends, whereupon torchrun ends the others; one that is still there after the grace met
    the error alone and must not be silent.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(_GRACE_SECONDS)
    message = " ".join(str(error).splitlines())
    lines = [f"popsd: error: {message}" + (f" (rank {rank})" if rank else ""), *error.advice]
    print("\n".join(lines), file=sys.stderr, flush=True)
