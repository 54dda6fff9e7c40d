"""Rules that annotate the type of a setting: `Annotated[int, Bounds(1, 100)]`, `Annotated[str, Text.PATH]`.

Every numeric setting declares finite bounds, so that an unusable value (an infinite time-out, a seed that no generator
accepts, a batch that exceeds memory) is refused when the configuration is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from typing import get_type_hints

from nemo_popsd.settings.checks import refuse

SECONDS_OF_30_DAYS = 30 * 24 * 3600
"""The longest time-out that a setting accepts."""


@dataclass(frozen=True)
class Bounds:
    """The interval of a number, or of each number in a list."""

    low: float
    """Minimum."""
    high: float
    """Maximum."""
    above: bool = False
    """Exclude `low` itself."""
    below: bool = False
    """Exclude `high` itself."""
    or_zero: bool = False
    """Also allow 0, which disables the feature."""

    def contains(self, value: float) -> bool:
        """Whether `value` is within the bounds; false for NaN."""
        if self.or_zero and value == 0:
            return True
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        low, high = (f"{int(end):,}" if end == int(end) else f"{end:g}" for end in (self.low, self.high))
        interval = f"from {low} to {high}"
        if self.above or self.below:
            interval = f"{'above' if self.above else 'from'} {low} and {'below' if self.below else 'at most'} {high}"
        return f"{interval}, or 0" if self.or_zero else interval


class Text(Enum):
    """The use of a text, which determines its permitted characters and lengths."""

    LINE = "line"
    """One line, the default."""
    NAME = "name"
    """A short line that is not empty; also used as a name outside the configuration."""
    PATH = "path"
    """A path; a leading `~` is the home directory."""
    PROSE = "prose"
    """Text of any number of lines."""


Rule = Bounds | Text


@cache
def hints(schema: type) -> Mapping[str, object]:
    """The type of each field of the dataclass `schema`."""
    return get_type_hints(schema)


@cache
def rules(schema: type) -> Mapping[str, Rule]:
    """The declared rule of each field of the dataclass `schema`; nested sections are not entered."""
    declared: dict[str, Rule] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, Rule):
                declared[name] = rule
    return declared


def check_numbers(section: object, name: str = "") -> None:
    """Refuse a number of `section` that is out of bounds; nested sections check themselves.

    Args:
        section: an instance of a section's dataclass.
        name: its dotted name; "" for the root.

    Raises:
        UserError: names the setting and its bounds.
    """
    schema: type = type(section)
    kinds = hints(schema)
    for field, rule in rules(schema).items():
        value = getattr(section, field)
        if not isinstance(rule, Bounds) or value is None:
            continue
        for number in value if isinstance(value, list) else [value]:
            if not rule.contains(number):
                kind = "whole number" if kinds[field] in (int, int | None, list[int]) else "number"
                need = f"{kind}s {rule}" if isinstance(value, list) else f"a {kind} {rule}"
                raise refuse(f"{name}.{field}" if name else field, value, need)


def declared_rules(schema: type, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Dotted name and rule of every setting that declares one, in `schema` and its nested sections."""
    for name, rule in rules(schema).items():
        yield prefix + name, rule
    for name, hint in hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from declared_rules(hint, f"{prefix}{name}.")
