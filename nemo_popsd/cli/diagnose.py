"""`popsd diagnose CONF [key=value ...] [--checkpoint PATH]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments, example
from nemo_popsd.cli.launch import run_command
from nemo_popsd.config.paths import path_argument
from nemo_popsd.parallel.launcher import read_launch

if TYPE_CHECKING:
    from nemo_popsd.config.schema import PopsdConfig


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "diagnose",
        help="decompose the teacher's signal token by token",
        description="Generate responses to rows of `data.train` and compare, for each token, the log-probabilities of "
        "student, teacher, reference-only teacher and target. Writes a page and its data to `<output>/diagnosis`.",
        epilog=example("popsd diagnose conf/tiny.yaml --checkpoint runs/tiny/checkpoints/final diagnosis.rows=4"),
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        type=path_argument,
        default=None,
        help="NeMo checkpoint to diagnose; default: the model in student.source",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then diagnose."""
    from nemo_popsd.config.consistency import check_diagnosis_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    check_diagnosis_run(config, world_size=read_launch().world_size, checkpoint=args.checkpoint)
    run_command(_load, config, args.checkpoint)


def _load() -> Callable[[PopsdConfig, str | None], None]:
    from nemo_popsd.commands.entry import diagnose

    return diagnose
