from __future__ import annotations

import pytest

from nemo_popsd.evaluation.algebra.forms import (
    Dots,
    Form,
    Matrix,
    Named,
    Parted,
    Relation,
    Several,
    Words,
    in_direction,
    parse_answer,
)
from nemo_popsd.evaluation.algebra.lexer import UnreadableError, cleaned, tokens_of
from nemo_popsd.evaluation.algebra.quantities import Quantity


def parsed(text: str) -> Form:
    return parse_answer(tokens_of(cleaned(text)), letter_units=True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("18 dollars", Quantity),
        ("(x+1)(x-1)", Quantity),
        ("(5)", Quantity),
        ("no solution", Words),
        ("(C)", Words),
        ("x = 5", Named),
        ("m+n=809", Named),
        ("f(x)=x^2", Named),
        ("Answer: 42", Named),
        ("3x+4y=12", Relation),
        ("1<x<2", Relation),
        ("2:30 PM", Parted),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", Matrix),
    ],
)
def test_kinds(text: str, kind: type) -> None:
    assert isinstance(parsed(text), kind)


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("2, 3, and 5", "list", 3),
        ("(3,4)", "()", 2),
        ("[0,1)", "[)", 2),
        (r"\{1,2,3\}", "set", 3),
        (r"\emptyset", "set", 0),
        (r"[0,1)\cup(2,3]", "union", 2),
        (r"x \in [2,5]", "[]", 2),
        (r"1 \pm 2", "list", 2),
        (r"5, \pm 2", "list", 3),
        ("(a,b)=(1,2)", "list", 2),
        ("x=2 or x=3", "list", 2),
    ],
)
def test_several(text: str, kind: str, parts: int) -> None:
    found = parsed(text)
    assert isinstance(found, Several)
    assert (found.kind, len(found.parts)) == (kind, parts)


def test_parts() -> None:
    dots = parsed(r"1, 2, \ldots")
    assert isinstance(dots, Several)
    assert isinstance(dots.parts[-1], Dots)
    named = parsed("n=2, 3")
    assert isinstance(named, Several)
    assert [part.name for part in named.parts if isinstance(part, Named)] == ["n", "n"]
    turned = parsed("4 > x \\ge 1")
    assert isinstance(turned, Relation)
    assert in_direction(turned).signs == ("<=", "<")


@pytest.mark.parametrize("text", ["", "(", ",,", "5)", "[1)", "x=", r"\begin{pmatrix}1&2\\3\end{pmatrix}", "3 4", "()"])
def test_unreadable(text: str) -> None:
    with pytest.raises(UnreadableError):
        parsed(text)
