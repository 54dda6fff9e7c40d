"""Values of expressions, exact if they are rational, and equality of two expressions for all values of variables.

An expression without roots, constants and functions has an exact value. Others are computed with 50 and with 100
digits. Variables get several random rational values that depend on their names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import MPContext

from nemo_popsd.evaluation.algebra.expressions import Expression

_MOST_BITS = 30_000
"""Maximum size of an exact number: 2^30000, about 9,000 digits."""
_LARGEST_ARGUMENT = 2500
"""Largest argument of factorials and binomials."""
_POINTS = 4


class NoValueError(ValueError):
    """The expression has no value, or its value is too large to compute."""


def _context(digits: int) -> MPContext:
    made = MPContext()
    made.dps = digits
    return made


_COARSE, _FINE = _context(50), _context(100)

Value = Any
"""A `Fraction`, or a number of mpmath."""


def same_everywhere(one: Expression, other: Expression) -> bool:
    """Whether both have the same value for all values of their variables."""
    for point in _points(one.variables() | other.variables()):
        try:
            if not _same_at(one, other, point):
                return False
        except NoValueError:
            return False
    return True


def proportional(one: Expression, other: Expression, *, positive: bool) -> bool:
    """Whether `one` is `other` times a constant other than zero: then `one = 0` and `other = 0` are equivalent.

    Args:
        one: difference of the sides of an equation or an inequality.
        other: the same difference for another equation or inequality.
        positive: whether the constant must be positive.
    """
    points = list(_points(one.variables() | other.variables()))
    ratios = []
    try:
        for point in points:
            above, below = value_of(one, point, _FINE), value_of(other, point, _FINE)
            if above == 0 or below == 0:
                return False
            ratios.append(_divided(above, below, _FINE))
    except NoValueError:
        return False
    first = ratios[0]
    if positive and not (_real(first) and _real_part(first, _FINE) > 0):
        return False
    return all(_close(ratio, first, _FINE) for ratio in ratios)


def _points(variables: Iterable[str]) -> Iterable[Mapping[str, Fraction]]:
    names = sorted(variables)
    if not names:
        return [{}]
    made = []
    for number in range(_POINTS):
        point = {}
        for name in names:
            drawn = random.Random(f"{number} {name}")
            sign = drawn.choice((-1, 1)) if number % 2 else 1
            point[name] = sign * Fraction(drawn.randrange(101, 499, 2), drawn.choice((32, 81, 125, 343)))
        made.append(point)
    return made


def _same_at(one: Expression, other: Expression, point: Mapping[str, Fraction]) -> bool:
    coarse = [value_of(side, point, _COARSE) for side in (one, other)]
    if all(isinstance(value, Fraction) for value in coarse):
        return bool(coarse[0] == coarse[1])
    fine = [_as_float(value_of(side, point, _FINE), _FINE) for side in (one, other)]
    if any(_FINE.isinf(value) for value in fine):
        return bool(fine[0] == fine[1])
    difference = abs(fine[0] - fine[1])
    if difference <= max(abs(value) for value in fine) * _FINE.mpf(10) ** -70:
        return True
    # Both sides may be zero up to rounding: then more digits reduce the difference.
    rough = abs(_as_float(coarse[0], _COARSE) - _as_float(coarse[1], _COARSE))
    return bool(difference <= _FINE.mpf(10) ** -40 * rough or (rough == 0 and difference < _FINE.mpf(10) ** -80))


def value_of(expression: Expression, point: Mapping[str, Fraction], context: MPContext) -> Value:
    """The value of `expression` for the values of variables in `point`.

    Raises:
        NoValueError: it has no value, or a value that is too large.
    """
    kind = expression.operation
    if kind == "number":
        return expression.value
    if kind == "variable":
        return point[expression.name]
    if kind == "constant":
        constants = {"pi": context.pi, "e": context.e, "i": context.mpc(0, 1), "infty": context.inf}
        return +constants[expression.name]
    values = [value_of(argument, point, context) for argument in expression.arguments]
    try:
        found = _applied(expression, values, context)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
        raise NoValueError(str(error)) from None
    if isinstance(found, Fraction):
        _refuse_large(found.numerator.bit_length() + found.denominator.bit_length())
    elif context.isnan(found):
        raise NoValueError("not a number")
    return found


def _applied(expression: Expression, values: list[Value], context: MPContext) -> Value:
    kind = expression.operation
    if kind in ("+", "-", "*"):
        left, right = _alike(values, context)
        return left + right if kind == "+" else left - right if kind == "-" else left * right
    if kind == "/":
        return _divided(values[0], values[1], context)
    if kind == "negative":
        return -values[0]
    if kind == "^":
        return _power(values[0], values[1], context)
    if kind == "root":
        return _root(values[0], values[1], context)
    if kind == "abs":
        return abs(values[0])
    if kind == "degrees":
        return _as_float(values[0], context) * context.pi / 180
    if kind in ("floor", "ceiling"):
        if not isinstance(values[0], Fraction):
            _refuse_large_float(values[0], context)
        rounded = (math.floor if kind == "floor" else math.ceil)(_real_part(values[0], context))
        return Fraction(rounded)
    if kind == "!":
        return _factorial(values[0], context)
    if kind == "binom":
        return _binomial(values[0], values[1], context)
    return _called(expression.name, _as_float(values[0], context), context)


def _called(name: str, argument: Value, context: MPContext) -> Value:
    if name in ("exp", "sinh", "cosh", "tanh"):
        _refuse_large(abs(argument) * 2)
    elif name in ("sin", "cos", "tan", "cot", "sec", "csc"):
        _refuse_large_float(argument, context)
    elif name in ("ln", "log") and argument == 0:
        raise NoValueError("logarithm of zero")
    functions = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "log": "ln"}
    return getattr(context, functions.get(name, name))(argument)


def _alike(values: list[Value], context: MPContext) -> list[Value]:
    if all(isinstance(value, Fraction) for value in values):
        return values
    return [_as_float(value, context) for value in values]


def _as_float(value: Value, context: MPContext) -> Value:
    if isinstance(value, Fraction):
        return context.mpf(value.numerator) / value.denominator
    return value


def _divided(above: Value, below: Value, context: MPContext) -> Value:
    above, below = _alike([above, below], context)
    if below == 0:
        raise NoValueError("division by zero")
    return above / below


def _power(base: Value, exponent: Value, context: MPContext) -> Value:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1):
            _refuse_large(size * abs(exponent))
        if base == 0 and exponent < 0:
            raise NoValueError("division by zero")
        if base in (0, 1, -1):
            return base ** int(exponent % 2 or 2) if exponent else Fraction(1)
        return Fraction(base) ** int(exponent)
    base, exponent = _as_float(base, context), _as_float(exponent, context)
    if base == 0:
        raise NoValueError("a power of zero")
    _refuse_large(abs(exponent * context.ln(base)) * 2)
    return context.power(base, exponent)


def _root(degree: Value, value: Value, context: MPContext) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 1000:
        raise NoValueError("a root of this degree")
    if isinstance(value, Fraction) and degree == 2 and value >= 0:
        above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if above**2 == value.numerator and below**2 == value.denominator:
            return Fraction(above, below)
    value = _as_float(value, context)
    if _real(value) and value < 0 and degree % 2:
        return -context.root(-value, int(degree))
    return context.root(value, int(degree))


def _factorial(value: Value, context: MPContext) -> Value:
    """The factorial of a natural number, or the gamma function for other values, which variables may have."""
    _refuse_large_argument(value)
    if isinstance(value, Fraction) and value.denominator == 1:
        return Fraction(math.factorial(int(value)))
    return context.gamma(_as_float(value, context) + 1)


def _binomial(above: Value, below: Value, context: MPContext) -> Value:
    _refuse_large_argument(above)
    _refuse_large_argument(below)
    if all(isinstance(value, Fraction) and value.denominator == 1 and value >= 0 for value in (above, below)):
        return Fraction(math.comb(int(above), int(below)))
    return context.binomial(_as_float(above, context), _as_float(below, context))


def _refuse_large_argument(value: Value) -> None:
    if not abs(value) <= _LARGEST_ARGUMENT:
        raise NoValueError("too large")


def _refuse_large(bits: Value) -> None:
    if not bits <= _MOST_BITS:
        raise NoValueError("too large")


def _refuse_large_float(value: Value, context: MPContext) -> None:
    if not abs(value) < context.mpf(10) ** 40:
        raise NoValueError("too large for its digits")


def _real(value: Value) -> bool:
    return isinstance(value, Fraction) or not getattr(value, "imag", 0)


def _real_part(value: Value, context: MPContext) -> Value:
    if not _real(value):
        raise NoValueError("a complex number")
    return value if isinstance(value, Fraction) else context.mpf(value.real)


def _close(one: Value, other: Value, context: MPContext) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    one, other = _alike([one, other], context)
    return bool(abs(one - other) <= max(abs(one), abs(other)) * context.mpf(10) ** -40)
