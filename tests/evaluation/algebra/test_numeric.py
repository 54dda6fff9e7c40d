from __future__ import annotations

from fractions import Fraction

import pytest

from nemo_popsd.evaluation.algebra import numeric
from nemo_popsd.evaluation.algebra.expressions import Expression, parse_expression
from nemo_popsd.evaluation.algebra.lexer import tokens_of
from nemo_popsd.evaluation.algebra.numeric import NoValueError, proportional, same_everywhere, value_of


def parsed(text: str) -> Expression:
    return parse_expression(tokens_of(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("2^{-3}", Fraction(1, 8)), (r"\sqrt{4/9}", Fraction(2, 3)), ("5!/3!", Fraction(20)), ("0^0", 1)],
)
def test_fractions_stay_exact(text: str, value: Fraction) -> None:
    found = value_of(parsed(text), {}, numeric._COARSE)
    assert isinstance(found, Fraction)
    assert found == value


@pytest.mark.parametrize(
    "text", ["1/0", "0^{-1}", r"\ln 0", "9^{9^9}", "10000!", r"\binom{10^6}{5}", "e^{e^{20}}", "(-1)!"]
)
def test_no_value(text: str) -> None:
    with pytest.raises(NoValueError):
        value_of(parsed(text), {}, numeric._COARSE)
    assert not same_everywhere(parsed(text), parsed(text + "+0"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"\sqrt{2}\sqrt{2}-2", "0", True),
        (r"\sqrt{2}/10^{40}", "0", False),
        (r"\sqrt{2}/10^{40}", r"\sqrt{3}/10^{40}", False),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
        ("(x+y)^2", "x^2+2xy+y^2", True),
        ("(x+y)^2", "x^2+y^2", False),
        (r"\sqrt{x^2}", "|x|", True),
        (r"\infty", r"-\infty", False),
        (r"\infty", "5", False),
        ("(n+1)!", "(n+1)n!", True),
        (r"\binom{n+1}{2}", r"\frac{n(n+1)}{2}", True),
    ],
)
def test_same_everywhere(one: str, other: str, same: bool) -> None:
    assert same_everywhere(parsed(one), parsed(other)) is same


def test_proportional() -> None:
    assert proportional(parsed("2x-y+1"), parsed("y-2x-1"), positive=False)
    assert not proportional(parsed("2x-y+1"), parsed("y-2x-1"), positive=True)
    assert not proportional(parsed("x^2-4"), parsed("x-2"), positive=False)
    assert not proportional(parsed("x-x"), parsed("x-2"), positive=False)
