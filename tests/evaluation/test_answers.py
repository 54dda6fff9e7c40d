import time

import pytest

from nemo_popsd.evaluation.answers import extract_answer


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
    began = time.process_time()
    assert extract_answer(r"\boxed{" * 40_000) is None
    assert time.process_time() - began < 2


def test_pattern_replaces_the_box() -> None:
    text = "#### 5\n\\boxed{7}\n#### 1,000 \nend"
    assert extract_answer(text, r"####\s*(.+)") == "1,000"
    assert extract_answer("\\boxed{7}", r"####\s*(.+)") is None
    assert extract_answer("so answer 2 .", r"answer (\d+)") == "2"


def test_the_last_number_counts_only_if_requested() -> None:
    assert extract_answer("3 and -1,234.5 in all.") is None
    assert extract_answer("3 and -1,234.5 in all.", last_number=True) == "-1,234.5"
    assert extract_answer("it is $72.", last_number=True) == "72."
    assert extract_answer(r"\boxed{5} of 9", last_number=True) == "5"
    assert extract_answer("x7 none", last_number=True) is None
