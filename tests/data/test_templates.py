import re

import pytest

from nemo_popsd.data.config import TemplatesConfig
from nemo_popsd.data.templates import check_templates, fill, user_turns
from nemo_popsd.errors import UserError


def test_teachers_differ_only_in_the_question_block() -> None:
    templates = TemplatesConfig()
    turns = user_turns(templates, question="Q?", reference="R.")
    assert turns.privileged == templates.question_block.replace("{question}", "Q?") + turns.reference
    assert "Q?" not in turns.reference
    assert "R." not in turns.student


def test_the_default_reference_only_turn_does_not_mention_a_problem() -> None:
    turns = user_turns(TemplatesConfig(), question="Q?", reference="R.")
    assert not re.search("problem|question", turns.reference, re.IGNORECASE)
    check_templates(TemplatesConfig())


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
