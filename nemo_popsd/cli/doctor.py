"""`popsd doctor [CONF [key=value ...]]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, example, number
from nemo_popsd.config.paths import path_argument
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.launcher import world_size


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "doctor",
        help="check whether this machine can execute a run, or find out why a run ended",
        description="Compare the installed packages with the declared ranges; check devices, NCCL and disk. With CONF, "
        "check the settings and paths of that run on this machine. With --run, read the files of a run and print why "
        "it probably ended, with evidence. Exits with status 1 if a requirement is missing, or if the run ended "
        "without finishing.",
        epilog=example(
            "popsd doctor --imports", "popsd doctor conf/tiny.yaml --free-gib 10", "popsd doctor --run runs/tiny"
        ),
    )
    parser.add_argument("config", metavar="CONF", type=path_argument, nargs="?", help="configuration file of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings to change")
    parser.add_argument("--evaluate", action="store_true", help="check CONF for `popsd evaluate` instead of `train`")
    parser.add_argument(
        "--checkpoint", metavar="PATH", type=path_argument, default=None, help="with --evaluate: the checkpoint"
    )
    parser.add_argument(
        "--gpus", metavar="N", type=number(int, 0, 10**6), default=0, help="number of CUDA devices that must be visible"
    )
    parser.add_argument(
        "--free-gib",
        metavar="GIB",
        type=number(float, 0, 1e9),
        default=0.0,
        help="free disk space required at `output`",
    )
    parser.add_argument("--imports", action="store_true", help="also import every package; takes about a minute")
    parser.add_argument("--strict", action="store_true", help="treat a version outside its range as an error")
    parser.add_argument(
        "--sharing",
        metavar=("NODE", "NODES", "MARK"),
        nargs=3,
        default=None,
        help="with CONF, on all nodes at once: verify that they share one output directory",
    )
    parser.add_argument(
        "--run", dest="output", metavar="OUTPUT", type=path_argument, default=None, help="output directory of a run"
    )
    parser.add_argument(
        "--logs",
        metavar="PATH",
        type=path_argument,
        action="append",
        default=[],
        help="with --run: a log file, or a folder of logs, that the run does not record",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--missing", action="store_true", help="print only the missing requirements, one per line, for pip"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print, and return the exit status."""
    if args.output is not None:
        return _post_mortem(args)
    from nemo_popsd.doctor.examination import Question, examine
    from nemo_popsd.doctor.findings import as_json, as_table, exit_status
    from nemo_popsd.doctor.packages import missing_requirements

    if args.missing:
        print("\n".join(missing_requirements()))
        return 0
    findings = examine(
        Question(
            conf=args.config,
            overrides=args.overrides,
            evaluates=args.evaluate,
            checkpoint=args.checkpoint,
            world_size=world_size(),
            gpus=args.gpus,
            free_gib=args.free_gib,
            imports=args.imports,
            sharing=_sharing(args.sharing),
        )
    )
    print(as_json(findings, strict=args.strict) if args.json else as_table(findings), flush=True)
    return exit_status(findings, strict=args.strict)


def _post_mortem(args: argparse.Namespace) -> int:
    from nemo_popsd.doctor.post_mortem import examine_remains
    from nemo_popsd.doctor.remains import read_remains
    from nemo_popsd.doctor.verdict import as_json, as_text, exit_status

    if args.config is not None:
        raise UserError(
            "popsd doctor",
            got=f"CONF {args.config} and --run {args.output}",
            need="either a run to start or a run that has ended",
            fix="omit one of them",
        )
    result = examine_remains(read_remains(Path(args.output), [Path(path) for path in args.logs]))
    print(as_json(result) if args.json else as_text(result), flush=True)
    return exit_status(result)


def _sharing(words: list[str] | None) -> tuple[int, int, str] | None:
    if words is None:
        return None
    node, nodes, mark = words
    if not (node.isdecimal() and nodes.isdecimal() and int(node) < int(nodes)):
        raise UserError(
            "popsd doctor",
            got=f"--sharing {node} {nodes}",
            need="the index of a node, below the number of nodes",
            fix="correct NODE or NODES",
        )
    return int(node), int(nodes), mark
