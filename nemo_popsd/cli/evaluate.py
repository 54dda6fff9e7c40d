"""`popsd evaluate CONF [key=value ...] [--checkpoint PATH]`."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_popsd.cli.arguments import add_config_arguments, world_size
from nemo_popsd.cli.launch import run_entry


def add_parser(subparsers: Any) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure accuracy, markers and response length on held-out rows",
        description="Sample responses to `data.validation` as CONF says; report accuracy, markers and length.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="PATH", default=None, help="what to evaluate; default: student.source, untrained"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then evaluate."""
    from nemo_popsd.config.consistency import check_evaluation_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    check_evaluation_run(config, world_size=world_size(), checkpoint=args.checkpoint)
    run_entry("evaluate", config, args.checkpoint)
