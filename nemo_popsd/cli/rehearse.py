"""`popsd rehearse CONF nodes=N [gpus_per_node=8] [key=value ...] [--ranks 0,17,last] [--json]`."""

from __future__ import annotations

import argparse
import contextlib
import sys

from nemo_popsd.cli.arguments import Subparsers, example
from nemo_popsd.config.paths import path_argument


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "rehearse",
        help="execute one rank's step at the run's real sizes, without peers, weights or a GPU",
        description="Execute one step of CONF as one rank of N nodes with the code of the run. Tensors have shapes but "
        "no memory, and collectives return immediately. Memory, operations and collectives are measured and compared "
        "with `popsd plan` (docs/planning.md). Needs no GPU, no weights and no data.",
        epilog=example(
            "popsd rehearse conf/qwen3_8b.yaml student.source=Qwen3-8B nodes=4 parallel.tensor=2 --ranks 0,last",
            "popsd rehearse conf/qwen3_30b_a3b.yaml student.source=Qwen3-30B-A3B nodes=2 --all-kinds",
        ),
    )
    parser.add_argument(
        "config", metavar="CONF", type=path_argument, help="configuration file, e.g. conf/qwen3_8b.yaml"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="nodes=4, gpus_per_node=8, or a setting of the run",
    )
    parser.add_argument(
        "--ranks",
        default="",
        help="ranks, as in 0,17,last; default: the first, an inner and the last stage, and the first and the last "
        "group of experts",
    )
    parser.add_argument(
        "--all-kinds",
        action="store_true",
        help="rehearse one rank of every kind: each stage as above, every group of experts, the last vocabulary shard",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then rehearse and print."""
    from nemo_popsd.observability.console import set_up_console

    set_up_console()
    from nemo_popsd.rehearsal.command import rehearsal_text

    set_up_console()  # again: the import above adds handlers
    ranks = [rank for rank in args.ranks.split(",") if rank]
    with contextlib.redirect_stdout(sys.stderr):  # libraries print while a model is built
        text = rehearsal_text(args.config, args.overrides, ranks=ranks, all_kinds=args.all_kinds, as_json=args.json)
    print(text)
