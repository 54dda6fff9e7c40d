"""`popsd diagnose CONF [key=value ...] [--checkpoint PATH | --views VIEW,VIEW | --fp8]`."""

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


_REASONS = {
    "--views": "views are scored before training",
    "--fp8": "the frozen passes use the untrained model",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "diagnose",
        help="decompose the teacher's signal token by token",
        description="Generate responses to rows of `data.train` and compare the log-probabilities of student, teacher, "
        "reference-only teacher and target for each token. Write a page and its data to `<output>/diagnosis`. "
        "With --views, score views of the reference before training instead (settings `diagnosis.views`), and write "
        "to `<output>/views`. With --fp8, compare the rounding errors of emulated FP8 in the frozen passes with the "
        "distilled effect, and write to `<output>/fp8`.",
        epilog=example(
            "popsd diagnose conf/tiny.yaml --checkpoint runs/tiny/checkpoints/final diagnosis.rows=4",
            "popsd diagnose conf/tiny.yaml --views solution,answer,none data.train.columns.answer=answer",
            "popsd diagnose conf/tiny.yaml --fp8 diagnosis.rows=4",
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
        help="score how much these views of the reference would teach, before training: solution, answer, other, none, "
        "or columns of the rows",
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="measure how fp8.frozen would change the target of the untrained model; needs no GPU",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then diagnose."""
    from nemo_popsd.config.consistency import check_diagnosis_run, check_views_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    modes = [name for name, given in (("--views", args.views is not None), ("--fp8", args.fp8)) if given]
    if len(modes) > 1 or (modes and args.checkpoint is not None):
        other = modes[1] if len(modes) > 1 else f"--checkpoint {args.checkpoint!r}"
        raise UserError(
            modes[0],
            got=f"{other} in addition",
            need=f"the untrained model in student.source and no other mode: {_REASONS[modes[0]]}",
            fix="omit one of them; `popsd export` converts a checkpoint to a student.source",
        )
    if args.views is not None:
        views = [view.strip() for view in args.views.split(",")]
        check_views_run(config, views, world_size=read_launch().world_size)
        run_command(_load_views, config, views)
        return
    check_diagnosis_run(config, world_size=read_launch().world_size, checkpoint=args.checkpoint)
    if args.fp8:
        run_command(_load_fp8, config)
        return
    run_command(_load, config, args.checkpoint)


def _load() -> Callable[[PopsdConfig, str | None], None]:
    from nemo_popsd.commands.entry import diagnose

    return diagnose


def _load_views() -> Callable[[PopsdConfig, Sequence[str]], None]:
    from nemo_popsd.commands.views import score_views

    return score_views


def _load_fp8() -> Callable[[PopsdConfig], None]:
    from nemo_popsd.commands.fp8 import diagnose_fp8

    return diagnose_fp8
