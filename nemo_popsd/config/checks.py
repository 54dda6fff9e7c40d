"""Checks of single configuration values; each raises a `UserError` of the form "got X, need Y, set Z".

`name` is always the dotted name the user would set, e.g. ``"data.max_prompt_tokens"``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_popsd.errors import UserError


def _refuse(name: str, value: object, need: str) -> UserError:
    return UserError("configuration", got=f"{name}={value!r}", need=need, mend=f"set {name}")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a `value` that is not in `allowed`."""
    if value not in allowed:
        raise _refuse(name, value, f"one of {', '.join(allowed)}")


def at_least(name: str, value: float | None, minimum: float) -> None:
    """Refuse a `value` below `minimum`, or NaN. None (an optional setting left out) passes."""
    if value is not None and not value >= minimum:
        raise _refuse(name, value, f"at least {minimum}")


def above(name: str, value: float | None, bound: float) -> None:
    """Refuse a `value` not strictly greater than `bound`, or NaN. None passes."""
    if value is not None and not value > bound:
        raise _refuse(name, value, f"a number above {bound}")


def fraction(name: str, value: float | None, *, allow_zero: bool = True, allow_one: bool = True) -> None:
    """Refuse a `value` outside [0, 1], or outside the half-open or open interval that the flags leave. None passes."""
    if value is None:
        return
    above_lower = value >= 0 if allow_zero else value > 0
    below_upper = value <= 1 if allow_one else value < 1
    if not (above_lower and below_upper):
        interval = f"{'[' if allow_zero else '('}0, 1{']' if allow_one else ')'}"
        raise _refuse(name, value, f"a number in {interval}")


def pattern(name: str, value: str | None) -> None:
    """Refuse a regular expression that does not compile or has other than one group. None passes."""
    if value is None:
        return
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise _refuse(name, value, f"a regular expression ({error})") from None
    if groups != 1:
        raise _refuse(name, value, f"a regular expression with one group, this one has {groups}")
