"""The parser, and arguments that several sub-commands share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from nemo_popsd.config.paths import path_argument

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """argparse's, which says in one line what is wrong, as every other error of `popsd` is said."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with 2."""
        told = " ".join(message.split())
        told = told if told.isprintable() else ascii(told)[1:-1]
        told = told if len(told) <= 1000 else f"{told[:1000]}..."
        print(f"popsd: error: {told}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(2)


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the configuration file, which may be `optional`, and its overrides."""
    how: dict[str, Any] = {"nargs": "?", "default": None} if optional else {}
    parser.add_argument(
        "config", metavar="CONF", type=path_argument, help="configuration file, e.g. conf/tiny.yaml", **how
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="setting to change, e.g. training.steps=20 (null, lists [a, b] and quotes as in YAML)",
    )


def number(kind: Callable[[str], Number], low: Number, high: Number) -> Callable[[str], Number]:
    """The type of an argument that is a number within bounds."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # type: ignore[assignment]
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text[:50]!r}; need a number from {low:,} to {high:,}")
        return value

    return parse
