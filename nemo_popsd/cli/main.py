"""Entry point of `popsd`: parses the command line, runs a sub-command, and says in one line what went wrong."""

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
from nemo_popsd.cli import convert, diagnose, doctor, evaluate, export, plan, report, rollouts, show_config, train
from nemo_popsd.cli.arguments import Parser
from nemo_popsd.cli.boundary import missing_packages_named, quiet_when_nobody_reads
from nemo_popsd.cli.failures import LostPeerError
from nemo_popsd.errors import SAVED_AND_STOPPED, TransientError, UserError, user_or_transient
from nemo_popsd.parallel import launcher

_COMMANDS = (train, evaluate, diagnose, report, export, convert, plan, rollouts, show_config, doctor)

USER_ERROR = 2
"""Exit status for what the user must change."""
TRANSIENT = 1
"""Exit status for what another start may fix; Python's own for an exception that nobody caught."""

_GRACE_SECONDS = 3.0
"""How long ranks other than 0 wait for rank 0 to tell the error (and torchrun to end them) before they tell it."""
_EFFECT_SECONDS = 2.0
"""What is added to the moment of an effect: torchrun takes the earliest error, in whole seconds, for the cause."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `popsd` and all its sub-commands."""
    parser = Parser(
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
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


@quiet_when_nobody_reads
def main(argv: Sequence[str] | None = None) -> int:
    """Run `popsd`; returns the exit status. Exceptions other than those of `nemo_popsd.errors` escape."""
    args = parse(argv)
    # OpenMP's threads spin while they wait; on a shared CPU that made a small model's decoding twenty times slower.
    # Read when torch is first imported, which no module does before a sub-command runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with missing_packages_named():
            status = int(args.run(args) or 0)
    except (UserError, TransientError) as error:
        told = user_or_transient(error) if isinstance(error, UserError) else error
        _tell(told)
        status = USER_ERROR if isinstance(told, UserError) else TRANSIENT
    except KeyboardInterrupt:
        print(f"popsd {args.command}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        status = 128 + signal.SIGINT
    if status == SAVED_AND_STOPPED:
        _leave_for_torchrun("popsd: saved and stopped as a signal asked, which is no failure", time.time())
    _leave_hanging_trackers(status)
    return status


def _leave_hanging_trackers(status: int) -> None:
    """Ends the process without what libraries do at exit if a tracker hangs: they would wait for it, too."""
    trackers = sys.modules.get("nemo_popsd.observability.trackers")
    if trackers is not None and trackers.any_hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell(error: UserError | TransientError) -> None:
    """Print `error` once for the ranks that met it alike.

    Rank 0 speaks at once and ends, whereupon torchrun ends the others; one that is still there after the grace met
    the error alone and must not be silent.
    """
    rank = launcher.rank()
    message = "popsd: error: " + " ".join(str(error).splitlines()) + (f" (rank {rank})" if rank else "")
    moment = time.time() + (_EFFECT_SECONDS if isinstance(error, LostPeerError) else 0.0)
    if rank != 0:
        time.sleep(_GRACE_SECONDS)
    _leave_for_torchrun("\n".join([message, *error.advice]), moment)
    print("\n".join([message, *error.advice]), file=sys.stderr, flush=True)


def _leave_for_torchrun(message: str, moment: float) -> None:
    """Puts `message` where torchrun looks for the reason of a failure; its report ends with the earliest one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(moment))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
