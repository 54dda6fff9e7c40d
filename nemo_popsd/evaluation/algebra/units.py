"""Words after a number: known units, which are converted, and other words, which are compared as words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nemo_popsd.evaluation.algebra.lexer import names

_KINDS: dict[str, dict[str, Fraction]] = {
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "dm decimeter decimetre": Fraction(1, 10),
        "m meter metre": Fraction(1),
        "km kilometer kilometre": Fraction(1000),
        "in inch inche": Fraction(254, 10000),
        "ft foot feet": Fraction(3048, 10000),
        "yd yard": Fraction(9144, 10000),
        "mi mile": Fraction(1609344, 1000),
    },
    "mass": {
        "mg milligram": Fraction(1, 1000),
        "g gram": Fraction(1),
        "kg kilogram kilo": Fraction(1000),
        "oz ounce": Fraction(45359237, 16 * 100000),
        "lb pound": Fraction(45359237, 100000),
    },
    "time": {
        "s sec second": Fraction(1),
        "min minute": Fraction(60),
        "h hr hour": Fraction(3600),
        "day": Fraction(86400),
        "week": Fraction(7 * 86400),
    },
    "long time": {"month": Fraction(1), "yr year": Fraction(12), "decade": Fraction(120)},
    "volume": {"ml milliliter millilitre": Fraction(1, 1000), "l liter litre": Fraction(1)},
    "angle": {"degree deg": Fraction(1)},
    "money": {"cent penny pennie": Fraction(1, 100), "$ dollar usd buck": Fraction(1)},
    "rupee": {"\u20b9 rupee": Fraction(1)},
    "yen": {"\u00a5 yen": Fraction(1)},
    "euro": {"\u20ac euro eur": Fraction(1)},
    "sterling": {"\u00a3 gbp": Fraction(1)},
    "person": {"person people": Fraction(1)},
}
_KNOWN = {
    name: (kind, factor) for kind, units in _KINDS.items() for names, factor in units.items() for name in names.split()
}
_SPEEDS = {"mph": ("mi", "h"), "kmh": ("km", "h"), "kph": ("km", "h"), "kmph": ("km", "h")}
CURRENCIES = frozenset("$\u20ac\u00a3\u20b9\u00a5")
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
"""Words that multiply the number before them."""
NO_UNITS = names(
    "or and not no than plus minus if but half third halves thirds pi root sqrt remainder mod modulo base except "
    "between least most about approximately around is are was were equals percent"
)
"""Words that change the meaning of the number before them: an answer with one is not a number with a unit."""
_FILLERS = names(
    "old left each remaining total altogether more in all long tall wide high deep apart away later of the a an units "
    "unit"
)


@dataclass(frozen=True)
class Unit:
    """The unit of a number."""

    factor: Fraction
    """Factor from the unit to the base unit of its dimension."""
    powers: tuple[tuple[str, int], ...]
    """Dimensions of known units with their powers; empty for other words."""
    words: tuple[str, ...] = ()
    """The words in the singular, if one of them is unknown."""


def conversion(one: Unit, other: Unit) -> Fraction | None:
    """Number of `other` in one of `one`; None if their dimensions differ.

    Unknown words agree if one phrase ends with the other: duck eggs are eggs.
    """
    if one.words or other.words:
        shorter, longer = sorted((one.words, other.words), key=len)
        return Fraction(1) if shorter and longer[-len(shorter) :] == shorter else None
    return one.factor / other.factor if one.powers == other.powers else None


def is_known(word: str) -> bool:
    """Whether `word` is a unit by itself."""
    return word in CURRENCIES or _singular(word) in _KNOWN or word.lower() in _SPEEDS


def unit_of(words: Sequence[str]) -> Unit:
    """The unit that a phrase names; "/" is "per", and "^2" a power. Words without meaning are skipped."""
    singular = [_singular(word) for word in words]
    kept = [word for word in singular if word not in _FILLERS] or singular
    known = _known_unit(kept)
    return known if known is not None else Unit(Fraction(1), (), tuple(kept))


def _known_unit(words: Sequence[str]) -> Unit | None:
    factor, powers, sign, power = Fraction(1), dict[str, int](), 1, 1
    last: tuple[str, Fraction] | None = None
    for word in words:
        if word in ("per", "/"):
            sign = -1
        elif word in ("square", "sq"):
            power = 2
        elif word in ("cubic", "cu"):
            power = 3
        elif word in ("^2", "^3", "squared", "cubed"):
            if last is None:
                return None
            more = 1 if word in ("^2", "squared") else 2
            powers[last[0]] = powers.get(last[0], 0) + sign * more
            factor *= last[1] ** (sign * more)
        else:
            parts = _SPEEDS.get(word)
            for place, name in enumerate(parts or (word,)):
                if name not in _KNOWN:
                    return None
                last = _KNOWN[name]
                times = (sign if place == 0 else -sign) * power
                powers[last[0]] = powers.get(last[0], 0) + times
                factor *= last[1] ** times
            power = 1
    if last is None:
        return None
    return Unit(factor, tuple(sorted((kind, times) for kind, times in powers.items() if times)))


def _singular(word: str) -> str:
    word = word.lower().rstrip(".")
    if word in _KNOWN or word in _SPEEDS or word in _FILLERS:
        return word
    for ending, replaced in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and word.removesuffix(ending) + replaced in _KNOWN:
            return word.removesuffix(ending) + replaced
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word
