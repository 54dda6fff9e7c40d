import re

import pytest

from nemo_popsd.data.config import TemplatesConfig
from nemo_popsd.data.templates import check_templates, fill, student_turn, teacher_turn
from nemo_popsd.errors import UserError

ORDERS = ("question_first", "reference_first")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reference", ["R.", None])
def test_teachers_differ_only_in_the_question_block(order: str, reference: str | None) -> None:
    templates = TemplatesConfig(order=order)
    check_templates(templates)
    privileged = teacher_turn(templates, question="Q?", reference=reference)
    alone = teacher_turn(templates, question=None, reference=reference)
    block = templates.question_block.replace("{question}", "Q?")
    assert privileged.count(block) == 1
    assert privileged.replace(block, "") == alone
    assert "Q?" not in alone
    assert ("R." in alone) is (reference is not None)
    assert not re.search("problem|question", alone, re.IGNORECASE)
    if reference is not None:
        assert (privileged.index(block) < privileged.index(reference)) == (order == "question_first")


def test_without_a_reference_the_default_turn_is_the_students() -> None:
    templates = TemplatesConfig()
    assert teacher_turn(templates, question="Q?", reference=None) == student_turn(templates, question="Q?")


def test_the_teachers_share_the_reference_where_it_is_first() -> None:
    templates = TemplatesConfig(order="reference_first")
    privileged = teacher_turn(templates, question="Q?", reference="R.")
    shared = privileged[: privileged.index("Q?") - len("Problem: ")]
    assert "R." in shared
    assert teacher_turn(templates, question=None, reference="R.").startswith(shared)


def test_a_saved_default_follows_the_order() -> None:
    saved = TemplatesConfig(order="reference_first")
    again = TemplatesConfig(order="question_first", teacher=saved.teacher)
    assert again == TemplatesConfig()
    own = TemplatesConfig(order="reference_first", teacher="{reference}{question_block}!")
    assert own.teacher == "{reference}{question_block}!"


@pytest.mark.parametrize(
    ("order", "teacher"),
    [("question_first", "{reference} {question_block}"), ("reference_first", "{question_block} {reference}")],
)
@pytest.mark.parametrize("words", ["problem above", "question below"])
def test_a_teacher_in_the_other_order_is_refused(order: str, teacher: str, words: str) -> None:
    other = ORDERS[1 - ORDERS.index(order)]
    with pytest.raises(UserError, match=re.escape(f"order={order}")) as caught:
        check_templates(TemplatesConfig(order=order, teacher=teacher))
    assert f"data.templates.order={other}" in str(caught.value)
    fitting = TemplatesConfig(order=other, teacher=teacher)
    check_templates(fitting)
    with pytest.raises(UserError, match=words):
        check_templates(TemplatesConfig(order=other, teacher=f"{teacher} Solve the {words}."))


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("data.templates.order")):
        TemplatesConfig(order="reference")


def test_other_braces_are_literal() -> None:
    student = student_turn(TemplatesConfig(), question=r"Is {x} in \frac{1}{2}?")
    assert r"Problem: Is {x} in \frac{1}{2}?" in student
    assert student.endswith(r"\boxed{}.")


def test_replacement_is_one_pass() -> None:
    templates, reference = TemplatesConfig(), "See {question_block}{question}"
    privileged = teacher_turn(templates, question="What does {reference} mean?", reference=reference)
    alone = teacher_turn(templates, question=None, reference=reference)
    assert "What does {reference} mean?" in student_turn(templates, question="What does {reference} mean?")
    assert "What does {reference} mean?" in privileged
    assert "See {question_block}{question}" in alone
    assert "What does" not in alone


def test_backslashes_in_values_are_literal() -> None:
    assert fill("<{question}>", question=r"\1\g<0>\n") == r"<\1\g<0>\n>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "Solve it."}, "student without {question}"),
        ({"student": "{question} {reference}"}, "student with {reference}"),
        ({"student": "{question} {question_block}"}, "student with {question_block}"),
        ({"question_block": "Problem."}, "question_block without {question}"),
        ({"question_block": "{question}{reference}"}, "question_block with {reference}"),
        ({"teacher": "{question_block} think"}, "teacher without {reference}"),
        ({"teacher": "{reference} think"}, "teacher without {question_block}"),
        ({"teacher": "{question_block}{reference}{question}"}, "teacher with {question}"),
        ({"system": "You solve {question}"}, "system with {question}"),
        ({"without_reference": "Think."}, "without_reference without {question_block}"),
        ({"without_reference": "{question_block}{reference}"}, "without_reference with {reference}"),
        ({"without_reference": "{question_block}Now solve the problem above."}, "problem above"),
        ({"teacher": "{question_block}{reference} Now solve the problem above."}, "problem above"),
        ({"teacher": "{question_block}{reference} Answer the preceding question."}, "preceding question"),
    ],
)
def test_bad_templates_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_templates(TemplatesConfig(**change))
    assert f"data.templates.{next(iter(change))}" in str(caught.value)


def test_the_question_may_be_repeated() -> None:
    check_templates(TemplatesConfig(student="{question}\nRead it again: {question}"))
