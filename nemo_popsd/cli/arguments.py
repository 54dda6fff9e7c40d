"""Arguments that several sub-commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the configuration file, which may be `optional`, and its overrides."""
    how: dict[str, Any] = {"nargs": "?", "default": None} if optional else {}
    parser.add_argument("config", metavar="CONF", help="configuration file, e.g. conf/tiny.yaml", **how)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="setting to change, e.g. training.steps=20 (null, lists [a, b] and quotes as in YAML)",
    )
