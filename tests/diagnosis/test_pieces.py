"""The text of tokens, and the tokens of markers."""

from __future__ import annotations

import pytest

from nemo_popsd.diagnosis.pieces import marked_tokens, marker_entries, token_pieces
from nemo_popsd.evaluation.markers import marker_spans
from nemo_popsd.testbed.tokenizer import build_tokenizer
from tests.data.test_real_tokenizers import QWEN3, needs

MARKERS = ("Wait", "Maybe", "Let me think")
TEXT = "<think>\nWait, check 4 + 3: é漢字🙂 ﷽\u200d\n\nMaybe  7. Let me\nthink</think> naïve"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_pieces_join_to_the_text_and_no_character_is_split(tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXT
    assert "�" not in "".join(pieces)
    assert "" in pieces  # a token with part of a character


def test_pieces_of_an_empty_response_and_of_one_that_ends_inside_a_character(tokenizer) -> None:
    ids = tokenizer.encode("漢", add_special_tokens=False)
    assert len(ids) == 3
    assert token_pieces(tokenizer, ids[:2])[0] == ""
    assert token_pieces(tokenizer, ids[:2])[1] == tokenizer.decode(ids[:2])
    assert token_pieces(tokenizer, []) == []
    assert token_pieces(tokenizer, [*ids[:1], *tokenizer.encode("Wait", add_special_tokens=False)])[-1].endswith("Wait")


@needs(QWEN3)
@pytest.mark.slow
def test_pieces_and_marker_entries_of_a_real_tokenizer() -> None:
    from nemo_popsd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(QWEN3)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids)
    entries = marker_entries(tokenizer, ["Wait", "Alternatively"], len(tokenizer))
    assert {tokenizer.decode([token]) for token in entries["Wait"]} >= {"Wait", " Wait"}
    assert entries["Alternatively"]


def test_tokens_of_markers_are_marked_but_not_parts_of_other_words() -> None:
    pieces = ["Wa", "it", ",", " Wait", "ing", " Let", " me", "\n", "think", "", "!"]
    assert marked_tokens(pieces, MARKERS) == [True, True, *[False] * 3, *[True] * 4, False, False]
    assert marked_tokens([], MARKERS) == []
    assert marker_spans("Maybe Wait", MARKERS) == [(0, 5), (6, 10)]


def test_entries_of_a_marker_are_the_complete_marker(tokenizer) -> None:
    entries = marker_entries(tokenizer, MARKERS, len(tokenizer))
    for marker in ("Wait", "Maybe"):
        assert entries[marker]
        assert {tokenizer.decode([token]).strip() for token in entries[marker]} == {marker}
    assert entries["Let me think"] == []
    few = marker_entries(tokenizer, MARKERS, min(entries["Wait"]))
    assert few["Wait"] == []
