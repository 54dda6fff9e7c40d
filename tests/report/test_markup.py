"""Escaping and numbers."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_popsd.report.markup import data_block, esc, fixed, number, signed, visible

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


class Reader(HTMLParser):
    """Text, attributes and elements of a fragment."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.title = "", [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.title = dict(attrs).get("title", self.title)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text())
def test_any_text_survives_as_text_and_as_attribute(text: str) -> None:
    kept = _CONTROLS.sub("", text)
    read = Reader(f'<p title="{esc(text)}">{esc(text)}</p>')
    assert read.tags == ["p"]
    assert read.text == kept
    assert read.title == kept


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=4)))
def test_any_data_survives_in_its_block(value: object) -> None:
    block = data_block(value, "x")
    inside = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not set("<>&\u2028\u2029") & set(inside)
    assert json.loads(inside) == value


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        data_block([math.nan], "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.012345, "0.0123"),
        (-2.5, "−2.50"),
        (3.2e-7, "3.20e−07"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_fixed_and_signed_numbers() -> None:
    assert [fixed(v) for v in (61.72, -0.5, None)] == ["61.7", "−0.5", "–"]
    assert [signed(v) for v in (1.26, -1.26, 0.0, -0.01, None)] == ["+1.3", "−1.3", "0.0", "0.0", "–"]


def test_white_space_of_a_token_is_visible() -> None:
    assert visible(" a\n\t<") == "␣a⏎⇥&lt;"
    assert visible("") == "<i>empty</i>"
