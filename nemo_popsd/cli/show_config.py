"""`popsd config CONF [key=value ...]`."""

from __future__ import annotations

import argparse

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "config",
        help="print the resolved configuration",
        description="Print CONF with the overrides applied and all defaults filled in, as YAML.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load, check and print the configuration."""
    from omegaconf import OmegaConf

    from nemo_popsd.config.loading import load_config, to_dict_config

    print(OmegaConf.to_yaml(to_dict_config(load_config(args.config, args.overrides))), end="")
