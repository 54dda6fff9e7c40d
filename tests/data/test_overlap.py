"""Repeated questions within a data set and between two."""

from nemo_popsd.data.overlap import Questions, Repetition
from nemo_popsd.data.records import Record


def records(*rows: tuple[str, str]) -> list[Record]:
    return [Record(str(number), question, "R", answer) for number, (question, answer) in enumerate(rows)]


def test_white_space_and_case_do_not_matter_and_symbols_do() -> None:
    questions = Questions.of(records(("What is x+1?", "1"), ("what  is\nX + 1?", "1"), ("What is x-1?", "1")))
    assert questions.repetitions == [Repetition("1", "0", same_answer=True)]


def test_another_answer_is_reported() -> None:
    questions = Questions.of(records(("A?", "1"), ("A?", "2"), ("A?", "1")))
    assert [(one.earlier, one.same_answer) for one in questions.repetitions] == [("0", False), ("0", True)]


def test_shared_questions_are_in_the_order_of_the_other() -> None:
    train = Questions.of(records(("A?", "1"), ("B?", "1"), ("C?", "1")))
    held_out = Questions.of(records(("c?", "1"), ("D?", "1"), ("a?", "1")))
    assert train.shared_with(held_out) == [("2", "0"), ("0", "2")]
