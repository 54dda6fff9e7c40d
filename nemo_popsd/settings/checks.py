"""Checks of single configuration values; each raises a `UserError` of the form "got X, need Y, set Z".

`name` is the dotted name that the user sets, e.g. ``"data.max_prompt_tokens"``. Bounds of numbers are declared with the
settings (`nemo_popsd.settings.bounds`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_popsd.errors import UserError

_SHOWN = 120


def shown(value: object) -> str:
    """Format `value` as one line of bounded length, for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def refuse(name: str, value: object, need: str) -> UserError:
    """Return the error for an invalid `value` of the setting `name`."""
    return UserError("configuration", got=f"{name}={shown(value)}", need=need, fix=f"set {name}")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a `value` that is not in `allowed`."""
    if value not in allowed:
        raise refuse(name, value, f"one of {', '.join(allowed)}")


def pattern(name: str, value: str | None) -> None:
    """Refuse a regular expression that does not compile or does not have exactly one group. None is accepted."""
    if value is None:
        return
    try:
        groups = re.compile(value).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise refuse(name, value, f"a regular expression ({error})") from None
    if groups != 1:
        raise refuse(name, value, f"a regular expression with one group, not {groups}")
