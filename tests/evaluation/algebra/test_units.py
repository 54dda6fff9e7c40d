from __future__ import annotations

from fractions import Fraction

import pytest

from nemo_popsd.evaluation.algebra.units import conversion, is_known, unit_of


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        ("m", "cm", 100),
        ("km / h", "m / s", Fraction(5, 18)),
        ("mph", "miles per hour", 1),
        ("square feet", "ft ^2", 1),
        ("cm ^2", "cm", None),
        ("km", "m ^2", None),
        ("dollars", "cents", 100),
        ("$", "\u20ac", None),
        ("duck eggs", "egg", 1),
        ("eggs", "apples", None),
        ("meters", "apples", None),
        ("years old", "years", 1),
        ("people", "persons", 1),
    ],
)
def test_conversion(one: str, other: str, factor: Fraction | int | None) -> None:
    assert conversion(unit_of(one.split()), unit_of(other.split())) == factor


def test_known() -> None:
    assert is_known("Feet")
    assert is_known("mph")
    assert not is_known("apples")
