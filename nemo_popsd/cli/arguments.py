"""The parser, and arguments shared by several sub-commands."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

from nemo_popsd.config.paths import path_argument

Number = TypeVar("Number", int, float)

_EXAMPLE = "example"


class _Formatter(argparse.HelpFormatter):
    """argparse's formatter, but keeps the line breaks of `example`."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but prints an error as one line, like all errors of `popsd`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2."""
        text = " ".join(message.split())
        text = text if text.isprintable() else ascii(text)[1:-1]
        text = text if len(text) <= 1000 else f"{text[:1000]}..."
        print(f"popsd: error: {text}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(2)


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The object to which a sub-command adds its parser."""


def example(*commands: str) -> str:
    """Format the end of a sub-command's help: complete commands, one per line."""
    return "\n".join([f"{_EXAMPLE}{'s' if len(commands) > 1 else ''}:", *(f"  {command}" for command in commands)])


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the configuration file (which may be `optional`) and its overrides."""
    parser.add_argument(
        "config",
        metavar="CONF",
        nargs="?" if optional else None,
        type=path_argument,
        help="configuration file, e.g. conf/tiny.yaml",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="setting to change, e.g. training.steps=20 (null, lists [a, b] and quotes as in YAML); "
        "`popsd config CONF` prints all settings",
    )


def number(convert: Callable[[str], Number], low: Number, high: Number) -> Callable[[str], Number]:
    """Return the argparse type of a number from `low` to `high`."""

    def parse(text: str) -> Number:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan  # type: ignore[assignment]
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text[:50]!r}; need a number from {low:,} to {high:,}")
        return value

    return parse
