"""`popsd init [RECIPE [DIR]] [key=value ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.cli.arguments import Subparsers, example
from nemo_popsd.config.paths import path_argument
from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from nemo_popsd.config.schema import PopsdConfig


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "init",
        help="list the recipes, or write one as a configuration file",
        description="Without arguments, list the recipes of this package. With RECIPE, write DIR/RECIPE.yaml: the "
        "recipe with its comments and with your values. Relative paths in a configuration are relative to the "
        "directory in which popsd is started; existing paths among your values are written as absolute paths.",
        epilog=example(
            "popsd init",
            "popsd init tiny",
            "popsd init qwen3_8b mine student.source=/models/Qwen3-8B data.train.path=train.jsonl",
        ),
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default=None, help="name of a recipe")
    parser.add_argument(
        "words",
        metavar="DIR, key=value",
        nargs="*",
        default=[],
        help="directory of the file (default: the current one), and settings to change",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """List the recipes, or write one and print which of its paths exist."""
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.config.recipes import purpose, recipe_names, write_recipe

    if args.recipe is None:
        width = max(map(len, recipe_names()))
        print("".join(f"{name:{width}}  {purpose(name)}\n" for name in recipe_names()), end="")
        return
    folders = [word for word in args.words if "=" not in word]
    if len(folders) > 1:
        raise UserError("init", got=f"{' '.join(folders)}", need="one DIR, and key=value", fix="omit the others")
    try:
        folder = Path(path_argument(folders[0]) if folders else "")
    except argparse.ArgumentTypeError as error:
        raise UserError("init", got=f"DIR {folders[0]!r}", need=str(error), fix="correct it") from None
    path = write_recipe(args.recipe, folder, [word for word in args.words if "=" in word])
    config = load_config(path)
    command = "train" if config.data.train.path else "evaluate"
    print(f"configuration: {path}")
    print(_inputs(config), end="")
    print(f"next: popsd {command} {path}; `popsd config --describe KEY` explains a setting")


def _inputs(config: PopsdConfig) -> str:
    """Format one line for each input path of the run: found or not found."""
    from nemo_popsd.config.loading import by_key
    from nemo_popsd.config.recipes import READ_PATHS
    from nemo_popsd.data.models import model_path

    values, lines = by_key(config), []
    for key in READ_PATHS:
        value = str(values[key] or "")
        if value:
            path = model_path(value)
            state = (
                "found" if path.exists() else f"not found in {Path.cwd()}" if not path.is_absolute() else "not found"
            )
            lines.append(f"  {key}={value}  ({state})\n")
    return "".join(lines)
