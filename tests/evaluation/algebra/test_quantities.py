from __future__ import annotations

import pytest

from nemo_popsd.evaluation.algebra.lexer import UnreadableError, cleaned, tokens_of
from nemo_popsd.evaluation.algebra.numeric import same_everywhere
from nemo_popsd.evaluation.algebra.quantities import Quantity, parse_quantity, without_sentence
from nemo_popsd.evaluation.algebra.sameness import number


def parsed(text: str, *, letter_units: bool = True) -> Quantity:
    return parse_quantity(tokens_of(cleaned(text)), letter_units=letter_units)


@pytest.mark.parametrize(
    "text",
    [
        "18 dollars",
        "$18",
        "USD 18",
        "18 square feet",
        r"18\text{ cm}^2",
        "18 km/h",
        "18m",
        r"18^\circ",
        "18 apples a day",
    ],
)
def test_a_unit_is_separated_from_its_value(text: str) -> None:
    found = parsed(text)
    assert same_everywhere(found.expression, number(18))
    assert found.unit is not None


@pytest.mark.parametrize("text", ["18x", "2xyz", r"18\sin x", "18pi"])
def test_variables_are_not_units(text: str) -> None:
    assert parsed(text).unit is None


def test_a_letter_after_an_expected_number_is_a_variable() -> None:
    assert parsed("3m", letter_units=False).expression.variables() == {"m"}
    assert parsed("3 m", letter_units=False).unit is not None


def test_percent_scales_and_bases() -> None:
    assert parsed("12%").percent
    assert parsed(r"12\text{ percent}").percent
    assert same_everywhere(parsed("2 million dollars").expression, number(2_000_000))
    found = parsed("101_2")
    assert (found.base, found.digits) == (2, number(101))


@pytest.mark.parametrize(
    "text",
    ["18 or more", "18 and a half", "18 squared", "18 eggs squared", "7 remainder 2", "18 less than", "$", "12%5"],
)
def test_words_that_change_a_number(text: str) -> None:
    with pytest.raises(UnreadableError):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Janet makes 18 dollars", 2),
        ("the answer is 18", 1),
        ("she does not make 18", 5),
        ("she makes about 18", 4),
        ("makes 18", 2),
    ],
)
def test_sentences(text: str, left: int) -> None:
    assert len(without_sentence(tokens_of(text))) == left
