import re

import pytest

from nemo_popsd.data.config import TemplatesConfig
from nemo_popsd.data.templates import check_templates, fill, user_turns
from nemo_popsd.errors import UserError

ORDERS = ("question_first", "reference_first")


@pytest.mark.parametrize("order", ORDERS)
def test_teachers_differ_only_in_the_question_block(order: str) -> None:
    templates = TemplatesConfig(order=order)
    check_templates(templates)
    turns = user_turns(templates, question="Q?", reference="R.")
    block = templates.question_block.replace("{question}", "Q?")
    assert turns.privileged.count(block) == 1
    assert turns.privileged.replace(block, "") == turns.reference
    assert (turns.privileged.index(block) < turns.privileged.index("R.")) == (order == "question_first")
    assert "Q?" not in turns.reference
    assert "R." not in turns.student


@pytest.mark.parametrize("order", ORDERS)
def test_the_default_reference_only_turn_does_not_mention_a_problem(order: str) -> None:
    turns = user_turns(TemplatesConfig(order=order), question="Q?", reference="R.")
    assert not re.search("problem|question", turns.reference, re.IGNORECASE)


def test_the_teachers_share_the_reference_where_it_is_first() -> None:
    turns = user_turns(TemplatesConfig(order="reference_first"), question="Q?", reference="R.")
    shared = turns.privileged[: turns.privileged.index("Q?") - len("Problem: ")]
    assert "R." in shared
    assert turns.reference.startswith(shared)


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
    turns = user_turns(TemplatesConfig(), question=r"Is {x} in \frac{1}{2}?", reference="{y}")
    assert r"Problem: Is {x} in \frac{1}{2}?" in turns.student
    assert turns.student.endswith(r"\boxed{}.")


def test_replacement_is_one_pass() -> None:
    turns = user_turns(
        TemplatesConfig(), question="What does {reference} mean?", reference="See {question_block}{question}"
    )
    assert "What does {reference} mean?" in turns.student
    assert "What does {reference} mean?" in turns.privileged
    assert "See {question_block}{question}" in turns.reference
    assert "What does" not in turns.reference


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
