"""Paths in a configuration and on the command line: `~` is the home directory, `$` is refused.

A shell expands `$HOME`, but YAML does not: a directory with that literal name would be created.
"""

from __future__ import annotations

import argparse
import os

from nemo_popsd.errors import UserError
from nemo_popsd.settings.checks import refuse, shown

_LONGEST_PATH = 3072
"""Below Linux's 4,096 bytes, so that paths of files inside it fit."""
_LONGEST_NAME = 255


def given_path(setting: str, text: str) -> str:
    """Return the path in `text`, with `~` expanded.

    Args:
        setting: name of the setting or argument, for messages.
        text: the path; an empty text means no path, if the setting allows that.

    Raises:
        UserError: the path contains a shell variable, a home directory that does not exist or a control character, or
            is too long.
    """
    if "$" in text:
        raise UserError(
            "configuration",
            got=f"{setting}={shown(text)}, with a `$` that is not expanded",
            need="the path itself, or ~ for the home directory",
            fix=f"set {setting} without $; in a configuration ${{oc.env:NAME}} is the environment variable NAME",
        )
    path = os.path.expanduser(text)
    parts = path.split("/")
    if path.startswith("~") or "~" in parts:
        raise refuse(setting, text, "a path with `~` only at the beginning, for a home directory that exists")
    encoded = [os.fsencode(part) if part.isprintable() else b"" for part in parts]
    if sum(map(len, encoded)) + len(parts) > _LONGEST_PATH or max(map(len, encoded)) > _LONGEST_NAME:
        need = f"names of at most {_LONGEST_NAME} bytes in a path of at most {_LONGEST_PATH:,}"
        raise refuse(setting, text, need)
    return path


def path_argument(text: str) -> str:
    """Parse a command-line argument with `given_path`.

    Raises:
        argparse.ArgumentTypeError: as `given_path`; argparse adds the name of the argument.
    """
    try:
        if not text.isprintable():
            raise refuse("the path", text, "a path without control characters")
        return given_path("the path", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(f"got {error.got}; need {error.need}") from None
