from __future__ import annotations

from fractions import Fraction

import pytest

from nemo_popsd.evaluation.algebra.lexer import (
    LONGEST_ANSWER,
    UnknownCommandError,
    UnreadableError,
    cleaned,
    has_groups,
    tokens_of,
)


def texts(answer: str, *, grouped: bool = True) -> list[str]:
    return [token.text for token in tokens_of(cleaned(answer), grouped=grouped)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("1,234", ["1,234"]),
        ("1, 234", ["1", ",", "234"]),
        (r"12\,000", ["12 000"]),
        ("3 4", ["3", "4"]),
        (r"5 \quad 700", ["5", "700"]),
        (r"\left(\dfrac12,\, x\right)", ["(", r"\frac", "12", ",", "x", ")"]),
        (r"\boxed{\text{(C)}}.", ["{", "(", "C", ")", "}"]),
        ("$18", ["$", "18"]),
        ("$x=5$, $y=6$", ["x", "=", "5", ",", "y", "=", "6"]),
        ("2 x 10^3", ["2", r"\times", "10", "^", "3"]),
        ("x\u2264\u00bd", ["x", r"\le", r"\frac", "{", "1", "}", "{", "2", "}"]),
        ("2:30 p.m.", ["2", ":", "30", "p.m"]),
        ("1, 2, \u2026", ["1", ",", "2", ",", r"\ldots"]),
        ("", []),
    ],
)
def test_tokens(answer: str, found: list[str]) -> None:
    assert texts(answer) == found


def test_commas_separate_without_grouping() -> None:
    assert has_groups("1,234")
    assert not has_groups("1,23")
    assert texts("1,234", grouped=False) == ["1", ",", "234"]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (".5", Fraction(1, 2)),
        ("1.5e3", Fraction(1500)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.333...", Fraction(1, 3)),
        ("101_2", Fraction(5)),
        ("2A_{16}", Fraction(42)),
    ],
)
def test_values(answer: str, value: Fraction) -> None:
    (token,) = tokens_of(cleaned(answer))
    assert token.value == value


def test_words_in_text_are_marked() -> None:
    assert [token.quoted for token in tokens_of(r"5\text{ cm}")] == [False, True]
    assert [token.quoted for token in tokens_of(r"\mathrm{e}^2")] == [False, False, False]


@pytest.mark.parametrize(
    "answer", ["1" * (LONGEST_ANSWER + 1), "9" * 500, "1e5000", "\\", r"\text{a", r"\unknown", "a\x00", "x " * 450]
)
def test_unreadable(answer: str) -> None:
    with pytest.raises(UnreadableError):
        tokens_of(answer)


def test_commands_of_math_verify_are_distinguished() -> None:
    with pytest.raises(UnknownCommandError):
        tokens_of(r"\int x")
