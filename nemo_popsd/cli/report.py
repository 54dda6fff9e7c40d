"""`popsd report RUN [RUN ...] [--output FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, example
from nemo_popsd.config.paths import path_argument


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "report",
        help="write one page about one or several runs",
        description="Write one self-contained HTML page about the training runs in the directories RUN: whether "
        "accuracy changed, whether the model kept thinking, and what the target promoted. Several runs are compared; "
        "for runs that differ only in their seed, means and intervals are also printed.",
        epilog=example("popsd report runs/a runs/b --output report.html"),
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path_argument, help="output directory of a training run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=path_argument,
        default=None,
        help="page to write; an earlier page is replaced; default: report.html in the first RUN",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    from nemo_popsd.report import read_run, text_over_seeds, write_report
    from nemo_popsd.report.page import NAME

    runs = [Path(run) for run in args.runs]
    page = Path(args.output) if args.output else runs[0] / NAME
    written = write_report(runs, page)
    if over_seeds := text_over_seeds([read_run(run) for run in runs]):
        print(over_seeds)
    print(f"report: {written}")
