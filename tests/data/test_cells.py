"""Values of columns as pandas, JSON and chat data write them."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pytest

from nemo_popsd.data.cells import scalar_of, text_of
from nemo_popsd.data.readers import MalformedError


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (18, "18"),
        (18.0, "18"),
        (2.5, "2.5"),
        (1e16, "10000000000000000"),
        (1e-7, "0.0000001"),
        (-0.0, "0"),
        (Decimal("18.00"), "18"),
        (Decimal("0.10"), "0.10"),
        (10**30, "1" + "0" * 30),
        (" 18 ", "18"),
        ("0.50", "0.50"),
        ("none", "none"),
    ],
)
def test_answers(value: object, written: str) -> None:
    assert scalar_of({"answer": value}, "answer") == written


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "column 'answer' is null"),
        (float("nan"), "holds nan, which is not a number"),
        (float("inf"), "holds inf, which is not a number"),
        (Decimal("NaN"), "holds NaN, which is not a number"),
        ("nan", "holds 'nan', a missing value"),
        ("<NA>", "holds '<NA>', a missing value"),
        ("", "column 'answer' is empty"),
        ("\u200b\ufeff", "column 'answer' is empty"),
        (True, "holds bool, not text"),
        (["18"], "holds list, not text"),
        (b"18", "holds bytes, not text"),
        ({"value": "18"}, "holds dict, not text"),
        (datetime.date(2026, 1, 1), "holds date, not text"),
    ],
)
def test_missing_answers_are_malformed(value: object, error: str) -> None:
    with pytest.raises(MalformedError) as caught:
        scalar_of({"answer": value}, "answer")
    assert error in str(caught.value)


@pytest.mark.parametrize("blank", ["", " \n\t", "\u200b", "\ufeff\u2060", "\u3164", "\u00ad \u00a0", "\x00\x1b"])
def test_invisible_text_is_empty(blank: str) -> None:
    with pytest.raises(MalformedError, match="column 'question' is empty"):
        text_of({"question": blank}, "question", field="question")


def test_fields_of_columns() -> None:
    row = {"a": {"b": {"c": "x"}}, "a.b": "literal", "list": [{"c": "first"}, {"c": "last"}], "none": None}
    assert text_of(row, "a.b.c", field="question") == "x"
    assert text_of(row, "a.b", field="question") == "literal"
    assert text_of(row, "list.-1.c", field="question") == "last"
    for column, error in (
        ("a.x", "no field 'x' in column 'a', only b"),
        ("list.2.c", "no item 2 in column 'list', which has 2"),
        ("none.x", "column 'none' is null"),
        ("a.b.c.d", "column 'a.b.c' holds str, which has no field 'd'"),
        ("z.x", r"no column 'z.x', only a, a.b, list, none"),
    ):
        with pytest.raises(MalformedError) as caught:
            text_of(row, column, field="question")
        assert str(caught.value) == error


def message(role: str, content: object = "text") -> dict[str, object]:
    return {"role": role, "content": content}


def test_messages() -> None:
    row = {"messages": [message("user", "Q?"), message("assistant", "R.")]}
    assert text_of(row, "messages", field="question") == "Q?"
    assert text_of(row, "messages", field="reference") == "R."
    assert text_of({"m": [message("user", "Q?")]}, "m", field="question") == "Q?"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([message("system"), message("user")], "a message of role 'system', which would be ignored; name one"),
        ([message("user"), message("assistant"), message("user")], "2 messages of the user and 1 of the assistant"),
        ([message("assistant")], "0 messages of the user"),
        ([message("user", [{"type": "text", "text": "Q"}])], "holds list, not text"),
        ([message("user", None)], "holds null, not text"),
        ([message("user", "\u200b")], "is empty"),
        ([{"from": "human", "value": "Q"}], "a list, not text or messages with role and content"),
        (["Q"], "a list, not text or messages"),
        ([], "a list, not text or messages"),
    ],
)
def test_other_lists_are_malformed(messages: list[object], error: str) -> None:
    with pytest.raises(MalformedError) as caught:
        text_of({"messages": messages}, "messages", field="question")
    assert error in str(caught.value)
