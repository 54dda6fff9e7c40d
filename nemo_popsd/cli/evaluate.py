"""`popsd evaluate CONF [key=value ...] [--checkpoint PATH]`, `popsd evaluate --compare DIR DIR ... [--base NAME]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
        "evaluate",
        help="measure accuracy, epistemic markers and response length on problem sets, or compare evaluations",
        description="Generate responses to the problems of CONF (evaluation.sets, or data.validation) and report "
        "accuracy, epistemic markers and response length with confidence intervals. A repeated command generates only "
        "the missing samples.",
        epilog=example(
            "popsd evaluate conf/tiny.yaml output=runs/scores",
            "popsd evaluate conf/tiny.yaml output=runs/scores --checkpoint runs/tiny/checkpoints/final",
            "popsd evaluate --compare runs/scores/evaluation/*",
        ),
    )
    add_config_arguments(parser, optional=True)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        type=path_argument,
        default=None,
        help="NeMo checkpoint to evaluate; default: the model in student.source",
    )
    parser.add_argument(
        "--compare",
        metavar="DIR",
        type=path_argument,
        nargs="+",
        default=[],
        help="evaluations to compare, such as OUTPUT/evaluation/MODEL (all its sets); generates nothing",
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        default=None,
        help="with --compare: the evaluation that the others are compared with, by name or path; default: the first",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare evaluations on disk; or load and check the configuration, then evaluate."""
    if args.compare:
        _compare(args)
        return
    if args.base is not None:
        raise UserError(
            "evaluate", got="--base without --compare", need="--compare DIR DIR --base NAME", fix="omit --base"
        )
    if args.config is None:
        raise UserError("evaluate", got="no configuration", need="CONF, or --compare DIR DIR", fix="pass one of them")
    from nemo_popsd.config.consistency import check_evaluation_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    check_evaluation_run(config, world_size=read_launch().world_size, checkpoint=args.checkpoint)
    if config.evaluation.endpoint.url:
        from nemo_popsd.commands.served import evaluate_endpoint
        from nemo_popsd.observability.console import set_up_console

        set_up_console()
        evaluate_endpoint(config)
    else:
        run_command(_load, config, args.checkpoint)


def _load() -> Callable[[PopsdConfig, str | None], None]:
    from nemo_popsd.commands.entry import evaluate

    return evaluate


def _compare(args: argparse.Namespace) -> None:
    from nemo_popsd.evaluation.comparison import compare_directories
    from nemo_popsd.evaluation.config import EvaluationConfig

    if args.config is not None or args.checkpoint is not None:
        raise UserError(
            "evaluate",
            got="--compare together with a configuration or --checkpoint",
            need="only directories of evaluations",
            fix="omit the other arguments",
        )
    print(compare_directories(args.compare, resamples=EvaluationConfig().resamples, base=args.base))
