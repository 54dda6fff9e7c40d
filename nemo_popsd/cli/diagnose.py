"""`popsd diagnose CONF [key=value ...] [--checkpoint PATH | --views VIEW,VIEW]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments, example
from nemo_popsd.cli.launch import run_command
from nemo_popsd.config.paths import path_argument
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.launcher import read_launch

if TYPE_CHECKING:
    from nemo_popsd.config.schema import PopsdConfig


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "diagnose",
        help="decompose the teacher's signal token by token",
        description="Generate responses to rows of `data.train` and compare, for each token, the log-probabilities of "
        "student, teacher, reference-only teacher and target. Write a page and its data to `<output>/diagnosis`. "
        "With --views, score views of the reference before training instead (settings `diagnosis.views`), and write "
        "to `<output>/views`.",
        epilog=example(
            "popsd diagnose conf/tiny.yaml --checkpoint runs/tiny/checkpoints/final diagnosis.rows=4",
            "popsd diagnose conf/tiny.yaml --views solution,answer,none data.train.columns.answer=answer",
        ),
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        type=path_argument,
        default=None,
        help="NeMo checkpoint to diagnose; default: the model in student.source",
    )
    parser.add_argument(
        "--views",
        metavar="VIEW,VIEW",
        default=None,
        help="score what these views of the reference would teach, before training: solution, answer, other, none, or "
        "columns of the rows",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then diagnose."""
    from nemo_popsd.config.consistency import check_diagnosis_run, check_views_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    if args.views is not None:
        if args.checkpoint is not None:
            raise UserError(
                "--views",
                got=f"--checkpoint {args.checkpoint!r} beside it",
                need="the untrained model in student.source: views are scored before training",
                fix="omit one of them; `popsd export` makes a student.source of a checkpoint",
            )
        views = [view.strip() for view in args.views.split(",")]
        check_views_run(config, views, world_size=read_launch().world_size)
        run_command(_load_views, config, views)
        return
    check_diagnosis_run(config, world_size=read_launch().world_size, checkpoint=args.checkpoint)
    run_command(_load, config, args.checkpoint)


def _load() -> Callable[[PopsdConfig, str | None], None]:
    from nemo_popsd.commands.entry import diagnose

    return diagnose


def _load_views() -> Callable[[PopsdConfig, Sequence[str]], None]:
    from nemo_popsd.commands.views import score_views

    return score_views
