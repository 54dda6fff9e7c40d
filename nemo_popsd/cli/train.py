"""`popsd train CONF [key=value ...] [--seeds 1,2,3] [--grid key=a,b]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments, example
from nemo_popsd.cli.launch import run_command
from nemo_popsd.errors import UserError
from nemo_popsd.files.output_lock import OutputLock
from nemo_popsd.parallel.launcher import read_launch, restarts


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model with Purified OPSD",
        description="Train a model with the settings of CONF. Checkpoints, metrics and the resolved configuration are "
        "written to `output`.",
        epilog=example(
            "popsd train conf/tiny.yaml training.steps=4 output=runs/first",
            "popsd train conf/tiny.yaml --seeds 1,2,3 --grid optimizer.lr=1e-4,3e-4",
            "torchrun --nproc-per-node 2 -m nemo_popsd train conf/tiny.yaml parallel.tensor=2",
        ),
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--seeds",
        metavar="N,N",
        type=_seeds,
        default=[],
        help="train one run per seed, sequentially, in OUTPUT/seed_N, and report means over the seeds",
    )
    parser.add_argument(
        "--grid",
        metavar="key=a,b",
        action="append",
        default=[],
        help="train one run per value; several --grid options and --seeds are combined",
    )
    parser.set_defaults(run=run)


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and word.isascii() and int(word) < 2**32 for word in words):
        raise argparse.ArgumentTypeError(f"got {text[:50]!r}; need whole numbers below 2^32, as in 1,2,3")
    return [int(word) for word in words]


def run(args: argparse.Namespace) -> int:
    """Load and check the configuration, then train, unless the run is finished; or train the runs of a sweep."""
    if args.seeds or args.grid:
        return _sweep(args)
    from nemo_popsd.runtime.early_signals import ended_by_signals

    with ended_by_signals():
        return _train(args)


def _sweep(args: argparse.Namespace) -> int:
    """Check the configurations of all runs, then train them."""
    from nemo_popsd.cli.sweep import own_overrides, runs_of, train_in_sequence
    from nemo_popsd.config.consistency import check_training_run
    from nemo_popsd.config.loading import load_config

    if read_launch().world_size > 1:
        raise UserError(
            "sweep",
            got=f"--seeds or --grid on {read_launch().world_size} ranks",
            need="a single process, which starts the runs sequentially",
            fix="start each run with torchrun, or submit slurm/sweep.sh",
        )
    config, runs = load_config(args.config, args.overrides), runs_of(args.seeds, args.grid)
    for one in runs:
        own = own_overrides(one, output=config.output, name=config.name)
        check_training_run(load_config(args.config, [*args.overrides, *own]), world_size=1)
    return train_in_sequence(args.config, args.overrides, runs, output=config.output, name=config.name)


def _train(args: argparse.Namespace) -> int:
    from nemo_popsd.config.consistency import check_training_run, holds_a_run
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.config.resuming import finished_steps, refuse_another_run
    from nemo_popsd.observability.checks import check_trackers

    launch = read_launch()
    config = load_config(args.config, args.overrides)
    if restarts():
        config = replace(config, overwrite=False)  # the launcher's first start has removed the old run
    check_training_run(config, world_size=launch.world_size)
    check_trackers(config.observability)
    if holds_a_run(config.output) and not config.overwrite:
        refuse_another_run(load_config(Path(config.output) / "config.yaml"), config)
        steps = finished_steps(config.output)
        if steps is not None and steps >= config.training.steps:
            if launch.rank == 0:
                print(
                    f"{config.output} is finished after {steps} steps; a larger training.steps continues it, "
                    "overwrite=true trains it again from step 1, and another output starts a new run"
                )
            return 0
    if launch.rank != 0:
        return run_command(_load, config)
    # Rank 0 holds the lock for all ranks; `commands.entry.train` shares it with them.
    lock = OutputLock(config.output)
    try:
        return run_command(_load, config, lock=lock)
    finally:
        lock.release()


def _load() -> Callable[..., int]:
    from nemo_popsd.commands.entry import train

    return train
