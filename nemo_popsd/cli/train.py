"""`popsd train CONF [key=value ...]`."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_popsd.cli.arguments import add_config_arguments, world_size
from nemo_popsd.cli.launch import run_entry


def add_parser(subparsers: Any) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model with Purified OPSD",
        description="Train a model as CONF says; checkpoints, metrics and the resolved configuration go to `output`.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load and check the configuration, then train."""
    from nemo_popsd.config.consistency import check_training_run
    from nemo_popsd.config.loading import load_config

    config = load_config(args.config, args.overrides)
    check_training_run(config, world_size=world_size())
    run_entry("train", config)
