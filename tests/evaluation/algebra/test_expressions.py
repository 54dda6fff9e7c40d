from __future__ import annotations

import pytest

from nemo_popsd.evaluation.algebra.expressions import Expression, parse_expression
from nemo_popsd.evaluation.algebra.lexer import UnreadableError, tokens_of


def parsed(text: str) -> Expression:
    return parse_expression(tokens_of(text))


def written(expression: Expression) -> str:
    """In prefix form."""
    if not expression.arguments:
        return expression.name or str(expression.value)
    return f"({expression.name or expression.operation} {' '.join(map(written, expression.arguments))})"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("1+2*3", "(+ 1 (* 2 3))"),
        ("-2^2", "(negative (^ 2 2))"),
        ("2^{-1}", "(^ 2 (negative 1))"),
        ("2^3^2", "(^ 2 (^ 3 2))"),
        (r"\frac12", "(/ 1 2)"),
        (r"\frac{1}2x", "(* (/ 1 2) x)"),
        ("1 1/4", "(+ 1 1/4)"),
        (r"-1\frac12", "(negative (+ 1 1/2))"),
        (r"2\frac{x}{3}", "(* 2 (/ x 3))"),
        (r"2\sqrt3", "(* 2 (root 2 3))"),
        (r"\sqrt[3]{x}", "(root 3 x)"),
        (r"{3 \over 4}", "(/ 3 4)"),
        (r"\sin^2 x", "(^ (sin x) 2)"),
        (r"\sin 2x+1", "(+ (sin (* 2 x)) 1)"),
        (r"\log_2 8", "(/ (log 8) (log 2))"),
        (r"\sin^{-1} x", "(arcsin x)"),
        ("|x-1|", "(abs (- x 1))"),
        ("5!", "(! 5)"),
        ("2xy", "(* (* 2 x) y)"),
        ("x_{10}", "x_10"),
        ("x^2y", "(* (^ x 2) y)"),
        (r"2\pm 1", "(+- 2 1)"),
        (r"30^\circ", "(degrees 30)"),
        (r"\lfloor x \rfloor", "(floor x)"),
    ],
)
def test_forms(text: str, form: str) -> None:
    assert written(parsed(text)) == form


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 4",
        "3sqrt",
        "1+",
        "(1",
        "1)",
        r"\frac{1}",
        "x2",
        "apples",
        r"\frac110",
        r"\sin^{-2} x",
        "2^",
        "(" * 60 + "1",
    ],
)
def test_unused_tokens_are_refused(text: str) -> None:
    with pytest.raises(UnreadableError):
        parsed(text)


def test_properties_of_an_expression() -> None:
    assert parsed("xy+z^2").variables() == {"x", "y", "z"}
    assert parsed("m+n").is_of_variables_alone()
    assert not parsed("m+1").is_of_variables_alone()
    two = parsed(r"1\mp 2")
    assert two.has_two_signs()
    assert written(two.with_sign(True)) == "(- 1 2)"
