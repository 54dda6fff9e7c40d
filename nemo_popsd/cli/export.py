"""`popsd export CHECKPOINT OUTPUT`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, example
from nemo_popsd.cli.launch import run_command
from nemo_popsd.config.paths import path_argument
from nemo_popsd.errors import UserError


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "export",
        help="write a NeMo checkpoint as a Hugging Face directory",
        description="Write the NeMo checkpoint CHECKPOINT as a Hugging Face directory OUTPUT with merged adapters, or "
        "only its adapters for PEFT, with a model card. An earlier export in OUTPUT is replaced; any other existing "
        "OUTPUT is refused.",
        epilog=example(
            "popsd export runs/tiny/checkpoints/final models/tiny",
            "popsd export --adapter runs/qwen3_8b/checkpoints/final models/adapter --base Qwen/Qwen3-8B",
        ),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path_argument, help="NeMo checkpoint of a run")
    parser.add_argument("output", metavar="OUTPUT", type=path_argument, help="directory to write")
    parser.add_argument("--adapter", action="store_true", help="write only the LoRA adapters, in PEFT's format")
    parser.add_argument(
        "--base",
        metavar="NAME",
        default=None,
        help="name of the base on the Hub, such as Qwen/Qwen3-8B, or its path; default: student.source",
    )
    parser.add_argument(
        "--evaluation",
        metavar="DIR",
        type=path_argument,
        default=None,
        help="evaluations of the model for its card, such as OUTPUT/evaluation/MODEL; default: the run's validation",
    )
    parser.add_argument(
        "--base-evaluation", metavar="DIR", type=path_argument, default=None, help="evaluations of the base"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check both paths, then export."""
    from nemo_popsd.checkpoint.model_card import CardOptions
    from nemo_popsd.config.consistency import check_checkpoint, check_output
    from nemo_popsd.files.atomic import refuse_occupied
    from nemo_popsd.files.ownership import ADAPTER, EXPORT, refuse_overlap

    check_checkpoint(args.checkpoint, setting="CHECKPOINT")
    check_output(args.output, setting="OUTPUT")
    kind = ADAPTER if args.adapter else EXPORT
    refuse_overlap(Path(args.output), {"CHECKPOINT": args.checkpoint}, setting="OUTPUT")
    refuse_occupied(Path(args.output), kind, setting="OUTPUT")
    if args.base_evaluation is not None and args.evaluation is None:
        raise UserError(
            "export",
            got="--base-evaluation without --evaluation",
            need="evaluations of both models",
            fix="also pass --evaluation DIR",
        )
    load = _load_adapter_export if args.adapter else _load_export
    options = CardOptions(base=args.base, evaluation=args.evaluation, base_evaluation=args.base_evaluation)
    run_command(load, args.checkpoint, args.output, options=options)


def _load_export() -> Callable[..., None]:
    from nemo_popsd.commands.entry import export

    return export


def _load_adapter_export() -> Callable[..., None]:
    from nemo_popsd.commands.entry import export_adapter

    return export_adapter
