"""`popsd plan CONF nodes=N [gpus_per_node=8] [key=value ...] [--fastest] [--explain] [--json]`."""

from __future__ import annotations

import argparse

from nemo_popsd.cli.arguments import Subparsers, example
from nemo_popsd.config.paths import path_argument


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "plan",
        help="estimate memory, FLOPs, traffic and time of a run before it is queued",
        description="Estimate one step of CONF on N nodes by formula (docs/planning.md): memory, FLOPs, bytes sent and "
        "seconds per GPU. A layout that does not fit is refused, with the nearest layouts that fit. Needs no GPU, no "
        "weights and no data.",
        epilog=example(
            "popsd plan conf/qwen3_8b.yaml nodes=1",
            "popsd plan conf/qwen3_8b.yaml nodes=1,2,4 workload.response_tokens=800 --fastest",
            "popsd plan conf/qwen3_8b.yaml nodes=1,8,64 workload.prompts_per_node=32 --simulate",
            "popsd plan conf/qwen3_8b.yaml nodes=64 training.prompts_per_step=512 --failures",
            "popsd plan conf/paper_evaluation.yaml nodes=1 workload.evaluation_tokens=19000 --evaluation",
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
        help="nodes=4 (or 1,2,4 for a table), gpus_per_node=8, hardware.*, workload.* and simulation.* "
        "(nemo_popsd/planning/config.py), or a setting of the run",
    )
    parser.add_argument("--fastest", action="store_true", help="use the layout with the shortest estimated step")
    parser.add_argument(
        "--explain", action="store_true", help="add memory and seconds per step for changes of one setting at a time"
    )
    parser.add_argument(
        "--sharing",
        action="store_true",
        help="compare 1, 4 and 8 responses per prompt and both orders of the teachers' templates",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="simulate steps with responses of unequal lengths and slow nodes (simulation.*), by number of nodes",
    )
    parser.add_argument(
        "--failures",
        action="store_true",
        help="estimate goodput with node failures (simulation.*), and how often to save",
    )
    parser.add_argument("--evaluation", action="store_true", help="estimate the time of one evaluation, not of a step")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then estimate and print."""
    from nemo_popsd.planning.command import plan_text

    text = plan_text(
        args.config,
        args.overrides,
        fastest_layout=args.fastest,
        explain=args.explain,
        sharing=args.sharing,
        simulated=args.simulate,
        failures=args.failures,
        evaluation=args.evaluation,
        as_json=args.json,
    )
    print(text)
