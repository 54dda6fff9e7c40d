import time

import pytest

from nemo_popsd.evaluation.answers import answers_match, extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{72}", "72"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed {5}", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{4} but \boxed{\frac{1}{", "4"),
        (r"\boxed{4} as told: within \boxed{}.", "4"),
        (r"a } stray brace, \boxed{3}", "3"),
        (r"an { open brace, \boxed{3}", "3"),
        ("\\boxed{x\n+ 1}", "x\n+ 1"),
        (r"f \boxed{a \boxed{b} c}", "b"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_box(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_endless_boxes_take_linear_time() -> None:
    began = time.perf_counter()
    assert extract_answer(r"\boxed{" * 40_000) is None
    assert time.perf_counter() - began < 2


def test_pattern_replaces_the_box() -> None:
    text = "#### 5\n\\boxed{7}\n#### 1,000 \nend"
    assert extract_answer(text, r"####\s*(.+)") == "1,000"
    assert extract_answer("\\boxed{7}", r"####\s*(.+)") is None
    assert extract_answer("so answer 2 .", r"answer (\d+)") == "2"


def test_last_number_only_when_asked_for() -> None:
    assert extract_answer("3 and -1,234.5 in all.") is None
    assert extract_answer("3 and -1,234.5 in all.", last_number=True) == "-1,234.5"
    assert extract_answer("it is 72.", last_number=True) is not None
    assert answers_match(extract_answer("it is $72.", last_number=True), "72")
    assert extract_answer(r"\boxed{5} of 9", last_number=True) == "5"
    assert extract_answer("x7 none", last_number=True) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72", "72"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("$18", "18"),
        (r"\$18.00", "18"),
        ("18.", "18"),
        ("0.50", ".5"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{3}{6}", r"\tfrac12"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"\frac{-1}{2}", "-1/2"),
        ("+7", "7"),
        ("\u22125", "-5"),
        ("007", "7"),
        ("-0", "0"),
        (r"50\%", "50%"),
        (r"90^\circ", "90"),
        (r"\text{Monday}", "Monday"),
        (r"\boxed{12}", "12"),
        (r"\mathrm{\text{B}}", "B"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"x^2 + 1", "x^2+1"),
        (r"\(5\)", "5"),
    ],
)
def test_equal(one: str, other: str) -> None:
    assert answers_match(one, other)
    assert answers_match(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72", "73"),
        ("0.333", "1/3"),
        ("1,23", "123"),
        ("12", "1,2"),
        ("monday", "Monday"),
        ("(1,2)", "(2,1)"),
        ("5", "-5"),
        ("x=5", "5"),
        ("", ""),
        ("1/0", "0/0"),
        (r"\frac12", "12"),
        (r"\text{a}+\text{b}", "a}+\\text{b"),
        ("100000000000000000000000001", "100000000000000000000000000"),
    ],
)
def test_unequal(one: str, other: str) -> None:
    assert not answers_match(one, other)
    assert not answers_match(other, one)


def test_no_answer_never_matches() -> None:
    assert not answers_match(None, "None")


def test_monstrous_numbers_are_text() -> None:
    assert answers_match("9" * 10_000, "9" * 10_000)
    assert not answers_match("9" * 10_000, "9" * 9_999)
    assert not answers_match("1e999999999", "1")
