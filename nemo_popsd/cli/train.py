"""`popsd train CONF [key=value ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments
from nemo_popsd.cli.launch import run_command
from nemo_popsd.files.output_lock import OutputLock
from nemo_popsd.parallel.launcher import read_launch, restarts


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model with Purified OPSD",
        description="Train a model with the settings of CONF; checkpoints, metrics and the resolved configuration are "
        "written to `output`.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load and check the configuration, then train, unless the run is finished."""
    from nemo_popsd.runtime.early_signals import ended_by_signals

    with ended_by_signals():
        return _train(args)


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
                    "overwrite=true trains it again from step 1, another output starts another run"
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
