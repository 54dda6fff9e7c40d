"""How the steps of a run read responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config.loading import load_config
from nemo_popsd.data.records import Record
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.embedded.names import asset

CONF = Path(__file__).parents[2] / "conf" / "tiny.yaml"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(asset("nemo_popsd:tiny_reasoner"))


def read(*overrides: str, tokenizer: Any) -> Any:
    from nemo_popsd.model.training import build_reader

    return build_reader(load_config(CONF, list(overrides)), tokenizer)


def test_a_response_is_right_by_the_rules_of_the_evaluation(tokenizer: Any) -> None:
    reader = read("data.train.columns.answer=answer", tokenizer=tokenizer)
    record = Record("r", "q", "s", answer="96")

    def is_right(text: str) -> bool:
        return bool(reader.is_right(record, tokenizer(text, add_special_tokens=False)["input_ids"]))

    assert is_right(r"a red 96. \boxed{96}")
    assert not is_right(r"a red 96. \boxed{95}")
    assert not is_right("a red 96.")
    by_number = read("data.train.answer_pattern=(\\d+)", "evaluation.without_box=last_number", tokenizer=tokenizer)
    assert by_number.is_right(record, tokenizer("a red 96.", add_special_tokens=False)["input_ids"])


def test_rows_without_answers_are_not_compared(tokenizer: Any) -> None:
    assert read(tokenizer=tokenizer).is_right is None


def test_markers_are_those_of_the_evaluation(tokenizer: Any) -> None:
    reader = read("evaluation.markers=[red]", tokenizer=tokenizer)
    ids = tokenizer("a red 96, b blue 3, c red 4", add_special_tokens=False)["input_ids"]
    marked = [token for token, mark in zip(ids, reader.marked(ids), strict=True) if mark]
    assert reader.count_markers(ids) == len(marked) == 2
    assert [tokenizer.decode([token]).strip() for token in marked] == ["red", "red"]
