"""`popsd data check CONF [key=value ...]` and `popsd data convert LAYOUT SOURCE OUTPUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments, example, number
from nemo_popsd.config.paths import path_argument

WRONG = 2
"""Exit status of a check that finds a problem, the same as for a refused configuration."""
LAYOUTS = ("dasd", "openthoughts", "math-cot-20k", "gsm8k", "aime", "hmmt")
"""Names of the layouts in `nemo_popsd.data.published`, which is imported only when used."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "data",
        help="check the rows of a run, or convert a published data set to rows",
        description="Check the rows of a configuration before a run, or convert a published data set to rows.",
        epilog=example("popsd data check conf/tiny.yaml"),
    )
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="show rows in every template, lengths, duplicates, leaks and answers",
        description="Read all rows of CONF and show: some rows as student and teachers see them, lengths in tokens "
        "next to the limits, repeated questions, evaluation questions that are also in the training data, and how "
        "answers are compared. Reads no weights. Exits with status 2 if something is wrong.",
        epilog=example("popsd data check conf/tiny.yaml"),
    )
    add_config_arguments(check)
    check.add_argument(
        "--rows", metavar="N", type=number(int, 0, 1000), default=3, help="rows of each set to show; default: 3"
    )
    check.add_argument("--full", action="store_true", help="show long texts completely")
    check.set_defaults(run=run_check)
    convert = actions.add_parser(
        "convert",
        help="write a published data set as JSONL with question, reference and answer",
        description="Write the mathematics rows of a published data set as JSONL with those of the columns id, "
        "question, reference and answer that are published.",
        epilog=example(
            "popsd data convert openthoughts /data/OpenThoughts3-1.2M /data/openthoughts.jsonl --rows 30000",
            "popsd data convert aime /data/aime_2025 /data/aime25.jsonl",
        ),
    )
    convert.add_argument("layout", metavar="LAYOUT", choices=LAYOUTS, help=", ".join(LAYOUTS))
    convert.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        type=path_argument,
        help="file, quoted pattern or directory, downloaded from the Hub",
    )
    convert.add_argument("output", metavar="OUTPUT", type=path_argument, help="JSONL file to write")
    convert.add_argument(
        "--rows", metavar="N", type=number(int, 1, 10**12), default=None, help="size of a random sample; default: all"
    )
    convert.add_argument(
        "--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=0, help="seed of the sample; default: 0"
    )
    convert.set_defaults(run=run_convert)


def run_check(args: argparse.Namespace) -> int:
    """Print the check and return the exit status."""
    from nemo_popsd.commands.data_check import check_data
    from nemo_popsd.config.loading import load_config

    check = check_data(load_config(args.config, args.overrides), shown=args.rows, full=args.full)
    print(check, flush=True)
    return WRONG if check.wrong else 0


def run_convert(args: argparse.Namespace) -> None:
    """Check the output, convert, and print the counts."""
    from nemo_popsd.config.consistency import check_new_output
    from nemo_popsd.data.published import convert

    check_new_output(args.output, setting="OUTPUT")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    report = convert(args.layout, args.sources, Path(args.output), rows=args.rows, seed=args.seed)
    print(f"{args.output}: {report}")
