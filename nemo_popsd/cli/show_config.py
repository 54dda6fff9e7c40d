"""`popsd config CONF [key=value ...]` and `popsd config [CONF] --describe KEY`."""

from __future__ import annotations

import argparse

from nemo_popsd.cli.arguments import Subparsers, add_config_arguments, example
from nemo_popsd.errors import UserError


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "config",
        help="print the resolved configuration, or explain settings",
        description="Print CONF as YAML, with overrides and all defaults. With --describe, print the meaning, type, "
        "default and bounds of a setting.",
        epilog=example("popsd config conf/tiny.yaml training.steps=4", "popsd config --describe distillation.target"),
    )
    add_config_arguments(parser, optional=True)
    parser.add_argument(
        "--describe",
        metavar="KEY",
        default=None,
        help="explain the setting KEY, or all settings of the section KEY; with CONF, also show its values that differ "
        "from the defaults",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load, check and print the configuration, or explain settings."""
    from nemo_popsd.config.loading import load_config, to_dict_config

    if args.config is None and args.describe is None:
        raise UserError("config", got="no configuration", need="CONF, or --describe KEY", fix="pass one of them")
    config = None if args.config is None else load_config(args.config, args.overrides)
    if args.describe is not None:
        from nemo_popsd.config.description import describe
        from nemo_popsd.config.loading import by_key
        from nemo_popsd.config.schema import PopsdConfig
        from nemo_popsd.planning.config import PlanConfig

        values = {} if config is None else by_key(config)
        print(describe(args.describe, (PopsdConfig, PlanConfig), values=values))
        section, _, name = args.describe.partition(".")
        if section == "megatron" and name:
            from nemo_popsd.megatron.passthrough import listing

            print(f"\n{listing(name)}")
        return
    from omegaconf import OmegaConf

    assert config is not None
    print(OmegaConf.to_yaml(to_dict_config(config)), end="")
